"""`export`: an embedder for other programs, as a plain folder, as one file, or for vLLM."""

from __future__ import annotations

from pathlib import Path

from ..embedder.designs import find_design
from ..embedder.embedder import Embedder
from . import FORMATS
from .folder import export_folder
from .program import Exported, export_program, load_exported
from .vllm.folder import export_vllm

__all__ = ["Exported", "export", "export_folder", "export_program", "export_vllm", "load_exported"]


def export(embedder: Embedder, path: str | Path, format: str | None = None) -> float:
    """Write an embedder for others; see `export_folder` ("st"), `export_program` ("torch") and `export_vllm` ("vllm").

    Args:
        format: None is "st" for designs without a trainable pooler and "torch" for the others.

    Returns: the largest difference of a coordinate between the embedder and what was written.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    design = find_design(embedder[0].design)  # type: ignore[arg-type]
    chosen = format or ("torch" if design.trainable else "st")
    return {"st": export_folder, "torch": export_program, "vllm": export_vllm}[chosen](embedder, path)
