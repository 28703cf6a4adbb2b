"""mlpool: turn a language model into a text-embedding model. Pooling over all layers, exact and cheap."""

from typing import TYPE_CHECKING, Any

from .attention import bidirectional, causal, check_attention, is_bidirectional
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
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .attention import pack, unpack
    from .embedder import DESIGNS, Embedder, add_lora, load, merge, register_design

# Not imported with `import mlpool`, which needs torch alone.
_LATE = {
    "pack": "attention", "unpack": "attention", "DESIGNS": "embedder", "Embedder": "embedder", "add_lora": "embedder",
    "load": "embedder", "merge": "embedder", "register_design": "embedder",
}  # fmt: skip
__all__ = [
    "DESIGNS", "Embedder", "EosPool", "LastLayerPool", "LayerWeightsPool", "MeanPool", "MultiLayerPool", "Pool",
    "add_lora",
    "bidirectional", "causal", "check_attention", "gather", "is_bidirectional", "load", "merge", "pack",
    "register_design",
    "register_pool", "unpack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f".{_LATE[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or __name__).partition(".")[0] in (__name__, "mlpool_kernels"):
            raise
        raise ModuleNotFoundError(f"mlpool.{name} needs {error.name}: pip install 'mlpool[st]'") from error
    return getattr(module, name)
