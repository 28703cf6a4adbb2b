"""mlpool_kernels: multi-layer pooling for torch, with Triton kernels where there is a GPU. Needs torch alone."""

from .contrast import contrast
from .embed import embed
from .gather import gather
from .plan import Plan, Rates, Sizes, choose, predict
from .pool import Weights, cross_attend, fold_queries, fold_values, pool

__all__ = [
    "Plan", "Rates", "Sizes", "Weights", "choose", "contrast", "cross_attend", "embed", "fold_queries", "fold_values",
    "gather", "pool", "predict",
]  # fmt: skip
