"""mlpool: turn a language model into a text-embedding model. Pooling over all layers, exact and cheap."""

from .pooling import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool, gather

__version__ = "0.1.0"
__all__ = ["EosPool", "LastLayerPool", "LayerWeightsPool", "MeanPool", "MultiLayerPool", "gather"]
