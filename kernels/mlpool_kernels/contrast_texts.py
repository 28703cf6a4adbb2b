"""The texts of a contrast as both its forms take them: every prefix's inverse lengths, keys as ranks, and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import wide_dtype

# As torch.nn.functional.normalize: a vector of zeros has cosine 0 to everything.
NORM_EPS = 1e-12
NOWHERE = 2**31 - 1


class Texts(NamedTuple):
    """Rows [N,D] against others [M,D], contiguous and of one dtype, or a block of both.

    row_scale [S,N], other_scale [S,M]: inverse lengths of every stage. partners int32 [N]: the place among the others,
    `NOWHERE` where it is not here. row_keys [N,2]: of the text and of its partner, other_keys [M,2] the same,
    where one without a partner has its own twice; int32, both or neither. bound [N]: the highest cosine allowed.
    """

    rows: Tensor
    others: Tensor
    row_scale: Tensor
    other_scale: Tensor
    partners: Tensor
    row_keys: Tensor | None
    other_keys: Tensor | None
    bound: Tensor | None

    def block(self, here: slice, there: slice) -> Texts:
        def cut(x: Tensor | None, part: slice) -> Tensor | None:
            return None if x is None else x[part]

        return Texts(
            self.rows[here], self.others[there], self.row_scale[:, here].contiguous(),
            self.other_scale[:, there].contiguous(), _places(self.partners[here] - there.start, self.others[there]),
            cut(self.row_keys, here), cut(self.other_keys, there), cut(self.bound, here),
        )  # fmt: skip


def texts_of(
    rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
    bound: Tensor | None, dims: Sequence[int],
) -> tuple[Texts, list[int]]:  # fmt: skip
    """And the stages: the prefixes, and behind them D where only the bound needs it."""
    hidden = rows.shape[1]
    stages = [*dims] if bound is None or dims[-1] == hidden else [*dims, hidden]
    # A kernel reads memory as if it lay row by row; what a product or a view returns need not.
    rows, others, bound = rows.contiguous(), others.contiguous(), None if bound is None else bound.contiguous()
    scales = (inverse_lengths(rows, stages), inverse_lengths(others, stages))
    return Texts(rows, others, *scales, _places(partners, others), *_ranks(row_keys, other_keys), bound), stages


def _places(partners: Tensor, others: Tensor) -> Tensor:
    elsewhere = (partners < 0) | (partners >= len(others))
    return partners.masked_fill(elsewhere, NOWHERE).int()


def _ranks(row_keys: Tensor | None, other_keys: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The keys as int32, equal where they are: the place of each among all, sorted. Half the registers of a tile."""
    if row_keys is None or other_keys is None:
        return None, None
    keys = torch.cat([row_keys, other_keys])
    ranks = torch.searchsorted(keys.flatten().sort().values, keys, out_int32=True)
    return ranks[: len(row_keys)], ranks[len(row_keys) :]


def segments(stages: Sequence[int]) -> Iterator[slice]:
    """The columns that each stage adds to the one before."""
    yield from map(slice, (0, *stages[:-1]), stages)


def inverse_lengths(x: Tensor, stages: Sequence[int]) -> Tensor:
    """1 / length of every prefix, [S,N]."""
    parts = [torch.linalg.vector_norm(x[:, part], dim=1, dtype=wide_dtype(x)).square() for part in segments(stages)]
    return torch.stack(parts).cumsum(0).sqrt().clamp_(min=NORM_EPS).reciprocal()
