"""`export`: an embedder for other programs, as a plain folder or as one file."""

from __future__ import annotations

from pathlib import Path

from ..embedder.designs import find_design
from ..embedder.embedder import Embedder
from . import FORMATS
from .folder import export_folder
from .program import Exported, export_program, load_exported

__all__ = ["Exported", "export", "export_folder", "export_program", "load_exported"]


def export(embedder: Embedder, path: str | Path, format: str | None = None) -> float:
    """Write an embedder for other programs; see `export_folder` ("st") and `export_program` ("torch").

    Args:
        format: None is "st" for designs without a trainable pooler and "torch" for the others.

    Returns: the largest difference of a coordinate between the embedder and what was written.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    design = find_design(embedder[0].design)  # type: ignore[arg-type]
    chosen = format or ("torch" if design.trainable else "st")
    return (export_program if chosen == "torch" else export_folder)(embedder, path)
