"""A learned linear mix of the layers, each row brought to one length first: what a pool's embedding stands on.

A softmax mix of raw rows (ELMo, arXiv 1802.05365) goes by the rows' lengths, which in a decoder differ a hundredfold
from layer to layer, and cannot take a layer away from another. Here every layer counts by its weight, which may be
negative.
"""

from collections.abc import Sequence

import torch
from mlpool_kernels import rows
from torch import Tensor, nn

from .base import check_range

STARTS = ("last", "all")


def start_weights(start: str | Sequence[float], count: int) -> list[float]:
    """The mix of `count` layers that a pool starts from.

    Args:
        start: "last", the last layer read alone; "all", all layers evenly; or the weights themselves.

    Raises:
        ValueError: an unknown name, not `count` finite numbers, or zeros alone, which give no direction.
    """
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start must be one of {STARTS} or {count} weights, got {start!r}")
        return [1 / count] * count if start == "all" else [0.0] * (count - 1) + [1.0]
    try:
        weights = [float(weight) for weight in start]
    except TypeError:
        raise ValueError(f"start must be one of {STARTS} or {count} weights, got {start!r}") from None
    if len(weights) != count or not any(weights) or not torch.tensor(weights).isfinite().all():
        raise ValueError(f"start must be {count} finite weights, one for each layer read and not all 0, got {weights}")
    return weights


def fill_start(weights: nn.Parameter, start: str | Sequence[float]) -> None:
    """Set the weights [L] of a mix to its start; those of a meta device have none."""
    with torch.no_grad():
        weights.copy_(torch.tensor(start_weights(start, len(weights))))


def unit_rows(x0: Tensor) -> Tensor:
    """Every row of X0 [B, L, D] at length √D, so that its entries are about 1; float32 at least. Differentiable.

    A row of zeros stays zero and gets no gradient. One whose squares are no numbers of float32 becomes NaN; on a CPU it
    is an error, see `check_range`.
    """
    check_range(x0)
    return rows.unit_rows(x0)
