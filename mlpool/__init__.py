"""mlpool: turn a language model into a text-embedding model. Pooling over all layers, exact and cheap."""

from typing import TYPE_CHECKING, Any

from .attention import bidirectional, causal, check_attention, is_bidirectional
from .pooling import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool, gather

if TYPE_CHECKING:
    from .attention import pack, unpack

__version__ = "0.1.0"
__all__ = [
    "EosPool",
    "LastLayerPool",
    "LayerWeightsPool",
    "MeanPool",
    "MultiLayerPool",
    "bidirectional",
    "causal",
    "check_attention",
    "gather",
    "is_bidirectional",
    "pack",
    "unpack",
]


def __getattr__(name: str) -> Any:
    # Packing registers itself with transformers, which `import mlpool` alone must not need.
    if name not in ("pack", "unpack"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import attention

    return getattr(attention, name)
