"""`export`: an embedder for other programs, as a plain folder, one file, ONNX or for vLLM."""

from pathlib import Path

from ..embedder.designs import find_design
from ..embedder.embedder import Embedder
from . import FORMATS
from .folder import export_folder
from .onnx import export_onnx
from .program import Exported, export_program, load_exported
from .vllm.folder import export_vllm

__all__ = ["Exported", "export", "export_folder", "export_onnx", "export_program", "export_vllm", "load_exported"]


def export(embedder: Embedder, path: str | Path, format: str | None = None) -> float:
    """Write an embedder for other programs; see `export_folder`, `export_program`, `export_onnx` and `export_vllm`.

    Args:
        format: one of FORMATS; None is "st" for designs without a trainable pooler, "torch" for the others.

    Returns: the largest difference of a coordinate between the embedder and what was written.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    design = find_design(embedder[0].design)  # type: ignore[arg-type]
    write = {"st": export_folder, "torch": export_program, "onnx": export_onnx, "vllm": export_vllm}
    return write[format or ("torch" if design.trainable else "st")](embedder, path)
