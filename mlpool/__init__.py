"""mlpool: turn a language model into a text-embedding model. Pooling over all layers, exact and cheap."""

from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .attention import bidirectional, causal, check_attention, is_bidirectional, pack, unpack
    from .embedder import DESIGNS, Embedder, add_lora, dequantize, load, merge, register_design
    from .pooling import (
        EosPool,
        LastLayerPool,
        LayerWeightsPool,
        MeanPool,
        MultiLayerPool,
        Pool,
        gather,
        register_pool,
    )

# Imported when they are used: pools and attention need torch, embedders transformers too, and `mlpool --help` neither.
_ROOMS = {
    "attention": ("bidirectional", "causal", "check_attention", "is_bidirectional", "pack", "unpack"),
    "embedder": ("DESIGNS", "Embedder", "add_lora", "dequantize", "load", "merge", "register_design"),
    "pooling": (
        "EosPool", "LastLayerPool", "LayerWeightsPool", "MeanPool", "MultiLayerPool", "Pool", "gather", "register_pool",
    ),
}  # fmt: skip
__all__ = [
    "DESIGNS", "Embedder", "EosPool", "LastLayerPool", "LayerWeightsPool", "MeanPool", "MultiLayerPool", "Pool",
    "add_lora", "bidirectional", "causal", "check_attention", "dequantize", "gather", "is_bidirectional", "load",
    "merge", "pack", "register_design", "register_pool", "unpack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    room = next((room for room, names in _ROOMS.items() if name == room or name in names), None)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f".{room}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or __name__).partition(".")[0] in (__name__, "mlpool_kernels"):
            raise
        raise ModuleNotFoundError(f"mlpool.{name} needs {error.name}: pip install 'mlpool[st]'") from error
    return module if name == room else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
