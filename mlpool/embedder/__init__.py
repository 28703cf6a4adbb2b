"""The designs as embedders: build, encode, save and load. Needs `pip install 'mlpool[st]'`."""

from . import requirements  # noqa: F401  (first: it refuses an old sentence-transformers)
from .adapters import add_lora, dequantize, merge
from .designs import DESIGNS, Design, register_design
from .embedder import Embedder
from .loading import load

__all__ = ["DESIGNS", "Design", "Embedder", "add_lora", "dequantize", "load", "merge", "register_design"]
