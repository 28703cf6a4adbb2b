"""mlpool_kernels: multi-layer pooling for torch, with Triton kernels where there is a GPU. Needs torch alone."""

from .contrast import contrast
from .gather import gather
from .plan import Plan, Rates, Sizes, choose, predict
from .pool import Weights, fold_queries, fold_values, pool

__all__ = [
    "Plan",
    "Rates",
    "Sizes",
    "Weights",
    "choose",
    "contrast",
    "fold_queries",
    "fold_values",
    "gather",
    "pool",
    "predict",
]
