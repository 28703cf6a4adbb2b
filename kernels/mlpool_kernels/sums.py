"""Sums: of the parts that programs of a backward leave, all in one launch.

    out_j[i] = Σ_p parts_j[p, i]

A weight that every text shares, a bias or a norm's weight, has the sum over all texts as its gradient. Programs that
each see some texts leave float32 parts; by torch every sum would be an operation, and its rounding another.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from .runtime import ceil_div, jit, tl
from .tiles import tile


@jit
def _sum_kernel(
    parts, out, texts,
    COUNTS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns of one job: the columns of job j begin at block BLOCKS[j], its results at out + OFFSETS[j].

    COUNTS: how many parts each job has, 0 for one a text.
    """
    place = tl.program_id(0)
    source, count, width, block, target = parts[0], texts * 0 + COUNTS[0], WIDTHS[0], place, out
    count = tl.where(count == 0, texts, count)
    for j in tl.static_range(1, len(COUNTS)):
        mine = place >= BLOCKS[j]
        source = tl.where(mine, parts[j], source)
        count = tl.where(mine, texts if COUNTS[j] == 0 else COUNTS[j], count)
        width = tl.where(mine, WIDTHS[j], width)
        block = tl.where(mine, place - BLOCKS[j], block)
        target = tl.where(mine, out + OFFSETS[j], target)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        offset = part.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(source + offset, mask=(part < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(target + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def sum_parts(parts: Mapping[str, Tensor], texts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Triton: the sum over the first dimension of every tensor [P, N], float32 and contiguous, as [N] of `dtype`.

    texts: B; a tensor of so many parts is not compiled for again when B changes.
    """
    t = tile("sum")
    first = next(iter(parts.values()))
    widths = tuple(p.shape[1] for p in parts.values())
    counts = tuple(0 if len(p) == texts else len(p) for p in parts.values())
    blocks = (0, *accumulate(ceil_div(width, t["BLOCK_N"]) for width in widths))
    offsets = (0, *accumulate(widths))
    out = first.new_empty(offsets[-1], dtype=dtype)
    with torch.cuda.device_of(first):
        _sum_kernel[(blocks[-1],)](
            tuple(parts.values()), out, texts, counts, widths, blocks[:-1], offsets[:-1], **t
        )  # fmt: skip
    return dict(zip(parts, out.split(widths), strict=True))
