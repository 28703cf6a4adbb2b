"""Select: which rows of a padded batch are text, in one launch; as operations of torch's it is ten.

    kept[b,t] = mask[b,t] ≠ 0, is no token of the first `skip` ones, and token_mask[b,t] ≠ 0

A program reads the masks of one text. What it gives is what every gather asks for; the same by torch, with the checks
of what was passed in, is `mlpool.pooling.tokens`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .runtime import jit, power_of_2, tl
from .tiles import tile


@jit
def _select_kernel(
    mask, token_mask, spans, keep, B, T, stride_mask, stride_token_mask, SKIP: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    read, count, behind = 0, 0, 0
    for first in range(0, T, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        inside = place < T
        kept = tl.load(mask + text * stride_mask + place, mask=inside, other=0) != 0
        if SKIP > 0:
            order = read + tl.cumsum(kept.to(tl.int32), 0)
            read += tl.sum(kept.to(tl.int32), 0)
            kept = kept & (order > SKIP)
        if token_mask is not None:
            kept = kept & (tl.load(token_mask + text * stride_token_mask + place, mask=inside, other=0) != 0)
        tl.store(keep + text * T + place, kept, mask=inside)
        count += tl.sum(kept.to(tl.int32), 0)
        behind = tl.maximum(behind, tl.max(tl.where(kept, place + 1, 0), 0))
    tl.store(spans + text, text * T)
    tl.store(spans + B + text, text * T + T)
    # Of a text of which nothing is kept a row all the same: it may be read before the host knows.
    tl.store(spans + 2 * B + text, text * T + tl.maximum(behind - 1, 0))
    tl.store(spans + 3 * B + text, (text * 0 + count).to(tl.int64))


def select_padded(
    mask: Tensor, token_mask: Tensor | None, skip: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Triton: starts, ends, last and count, int64 [B], and keep, bool [B·T]; see `mlpool.pooling.tokens.Tokens`.

    Args:
        mask, token_mask: [B, T] bool or integer on a GPU. skip: tokens of each text to leave out.

    A text of which nothing is kept has a count of 0, which is for the caller to refuse, and its first row in `last`.
    """
    batch, length = mask.shape
    masks = [m if m is None or m.stride(1) == 1 else m.contiguous() for m in (mask, token_mask)]
    spans = torch.empty(4, batch, dtype=torch.int64, device=mask.device)
    keep = torch.empty(batch * length, dtype=torch.bool, device=mask.device)
    strides = [0 if m is None else m.stride(0) for m in masks]
    t = tile("select")
    block = min(t.pop("NUMBERS"), power_of_2(length, 16))
    with torch.cuda.device_of(mask):
        _select_kernel[(batch,)](*masks, spans, keep, batch, length, *strides, skip, block, **t)
    starts, ends, last, count = spans.unbind()
    return starts, ends, last, count, keep
