"""mlpool_kernels: multi-layer pooling for torch, with Triton kernels where there is a GPU. Needs torch alone."""

from .chunk import Weights
from .contrast import contrast
from .embed import embed
from .fold import fold_queries, fold_values
from .gather import gather
from .plan import Plan, Rates, Sizes, choose, predict
from .pool import cross_attend, pool

__all__ = [
    "Plan", "Rates", "Sizes", "Weights", "choose", "contrast", "cross_attend", "embed", "fold_queries", "fold_values",
    "gather", "pool", "predict",
]  # fmt: skip
