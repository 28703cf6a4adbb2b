"""Pools: from the states of a model to one embedding per text."""

from .base import Pool, gather
from .last_layer import LastLayerPool
from .multi_layer import MultiLayerPool
from .registry import register_pool
from .simple import EosPool, LayerWeightsPool, MeanPool
from .tokens import Tokens, select_tokens

__all__ = [
    "EosPool", "LastLayerPool", "LayerWeightsPool", "MeanPool", "MultiLayerPool", "Pool", "Tokens", "gather",
    "register_pool", "select_tokens",
]  # fmt: skip
