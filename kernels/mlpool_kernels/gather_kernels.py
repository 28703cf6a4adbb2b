"""Gather by Triton: the kernels and their launchers; the mathematics are `gather.py`'s.

The layers are passed to a kernel as a tuple of pointers and selected inside it: no table in memory, so no copy to the
device and nothing to keep alive, and the loads stay 16 bytes wide (tried: 24 layers, sm_90).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime import ceil_div, jit, tl
from .tiles import tile, whole_rows

# Programs that fill a large GPU several times over (132 multiprocessors), the fewest rows worth one, and the tile that
# adds up what they leave.
PROGRAMS, PART_ROWS = 1024, 16
SUM_TILE = {"BLOCK_T": 64, "BLOCK_D": 64, "num_warps": 4}


@jit
def _select(states, index, LAYERS: tl.constexpr):
    """The pointer of layer `index` (a scalar or a block of them) out of a tuple of pointers."""
    pointer = states[0] + index * 0
    for i in tl.static_range(1, LAYERS):
        pointer = tl.where(index == i, states[i], pointer)
    return pointer


@jit
def _inverse_length(x):
    """1 / ‖row‖ of a float32 tile, 0 of a row of zeros; what is no number stays none."""
    square = tl.sum(x * x, 1)
    zero = square == 0
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square)))


@jit
def _mean_kernel(
    states, starts, ends, keep, count, out, tokens, stride_text, stride_token, parts, texts_per_count,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [texts, LAYERS, parts, HIDDEN]: a program sums one of `parts` equal parts of a text's tokens.

    Without `count` the sums themselves, else means (parts is 1). Without `starts` every text has `tokens` rows. With
    UNIT the rows are brought to unit length, so BLOCK_D holds all of them.
    """
    text = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    layer = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    if starts is None:
        start, length = text * tokens, tokens
    else:
        start = tl.load(starts + text)
        length = (tl.load(ends + text) - start).to(tl.int32)
    size = (length + parts - 1) // parts
    first = part * size
    stop = tl.minimum(first + size, length)
    # A text's rows lie one stride apart: the only division is outside the loop.
    base = _select(states, layer, LAYERS) + (start // tokens) * stride_text + (start % tokens) * stride_token
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for done in range(first, stop, BLOCK_T):
        row = done + tl.arange(0, BLOCK_T)
        kept = row < stop
        if keep is not None:
            kept = kept & (tl.load(keep + start + row, mask=kept, other=0) != 0)
        # Rows left out are not read at all: NaN in padding stays in padding.
        offset = row.to(tl.int64)[:, None] * stride_token + column[None, :]
        x = tl.load(base + offset, mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if UNIT:
            x *= _inverse_length(x)[:, None]
        total += x
    result = tl.sum(total, 0)
    if count is not None:
        result = result / tl.load(count + text // texts_per_count).to(tl.float32)
    target = out + ((text * LAYERS + layer) * parts + part) * HIDDEN + column
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@jit
def _last_kernel(
    states, rows, out, tokens, stride_text, stride_token,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    base = _select(states, layer, LAYERS)
    row = tl.load(rows + text)
    base += (row // tokens) * stride_text + (row % tokens) * stride_token
    for first in range(0, HIDDEN, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < HIDDEN
        x = tl.load(base + column, mask=inside)
        tl.store(out + (text * LAYERS + layer) * HIDDEN + column, x, mask=inside)


@jit
def _backward_kernel(
    grads, states, added, grad_out, starts, ends, count, keep, rows, texts, tokens, stride_text, stride_token, parts,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, LAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A kept row gets its text's gradient, divided by the text's tokens, the others zero; every element once.

    A program writes one of `parts` equal parts of a text's rows. The first text's begin at row 0, another's where the
    one before ended, the last text's reach to the end, so that what lies around packed texts is written too.
    With LAST `ends` holds the last tokens themselves. `added` [rows, HIDDEN] or None is a gradient to add to. With
    `states`, for the unit mean, BLOCK_D holds whole rows.
    """
    text = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    layer = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    end = tl.load(ends + text)
    begin = tl.where(text == 0, 0, tl.load(ends + text - 1, mask=text > 0, other=0))
    start = end
    if LAST:
        end += 1
        begin = tl.where(text == 0, 0, begin + 1)
    else:
        start = tl.load(starts + text)
    length = (tl.where(text == texts - 1, rows, end) - begin).to(tl.int32)
    size = (length + parts - 1) // parts
    first = part * size
    stop = tl.minimum(first + size, length)
    grad = tl.load(grad_out + (text * LAYERS + layer) * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    if not LAST:
        grad = grad / tl.load(count + text).to(tl.float32)
    base = _select(grads, layer, LAYERS)
    if states is not None:
        source = _select(states, layer, LAYERS) + (start // tokens) * stride_text + (start % tokens) * stride_token
    for done in range(first, stop, BLOCK_T):
        place = done + tl.arange(0, BLOCK_T)
        row = begin + place
        kept = (row >= start) & (row < end)
        if keep is not None:
            kept = kept & (tl.load(keep + row, mask=kept, other=0) != 0)
        if states is not None:
            # As long as a row that is left out is not read, it counts as zeros, which get no gradient.
            lie = (row - start)[:, None] * stride_token + column[None, :]
            x = tl.load(source + lie, mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)
            inverse = _inverse_length(x)[:, None]
            unit = x * inverse
            value = (grad[None, :] - unit * tl.sum(unit * grad[None, :], 1)[:, None]) * inverse
        else:
            value = tl.where(kept[:, None], grad[None, :], 0.0)
        offset = row[:, None] * HIDDEN + column[None, :]
        mask = (place < stop)[:, None] & inside[None, :]
        if added is not None:
            value += tl.load(added + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(base + offset, value.to(grad_out.dtype.element_ty), mask=mask)


def token_strides(state: Tensor) -> tuple[int, int, int]:
    """(T, stride of a text, stride of a token) of a [B, T, D] or packed [total, D] tensor, in elements."""
    if state.dim() == 2:
        return state.shape[0], 0, state.stride(0)
    return state.shape[1], state.stride(0), state.stride(1)


def last_triton(states: Sequence[Tensor], last: Tensor) -> Tensor:
    """X0 [B, L, D], the rows `last` int64 [B] of every layer."""
    first = states[0]
    hidden, layers, batch = first.shape[-1], len(states), len(last)
    out = first.new_empty(batch, layers, hidden)
    t = tile("last", hidden=hidden)
    with torch.cuda.device_of(first):
        _last_kernel[(batch, layers)](tuple(states), last, out, *token_strides(first), layers, hidden, **t)
    return out


def _tile(kernel: str, hidden: int, unit: bool) -> dict[str, int]:
    if not unit:
        return tile(kernel, hidden)
    t, rows, columns = whole_rows("unit_mean", hidden)
    return t | {"BLOCK_T": rows, "BLOCK_D": columns}


def mean_triton(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, count: Tensor, keep: Tensor | None, unit: bool
) -> Tensor:
    """X0 [B, L, D]. Where texts alone are too few programs, each is summed in parts, which the same kernel adds up."""
    first = states[0]
    batch, layers, hidden = len(starts), len(states), first.shape[-1]
    t = _tile("mean", hidden, unit)
    blocks = ceil_div(hidden, t["BLOCK_D"])
    parts = _parts(batch * layers * blocks, first.shape[-2])
    out = first.new_empty(batch, layers, hidden)
    sums = out if parts == 1 else first.new_empty(batch, layers, parts, hidden, dtype=torch.float32)
    with torch.cuda.device_of(first):
        _mean_kernel[(batch * parts, layers, blocks)](
            tuple(states), starts, ends, keep, count if parts == 1 else None, sums, *token_strides(first), parts, 1,
            layers, hidden, unit, **t,
        )  # fmt: skip
        if parts > 1:
            _mean_kernel[(batch * layers, 1, ceil_div(hidden, SUM_TILE["BLOCK_D"]))](
                (sums,), None, None, None, count, out, parts, parts * hidden, hidden, 1, layers, 1, hidden, False,
                **SUM_TILE,
            )  # fmt: skip
    return out


def _parts(programs: int, longest: int) -> int:
    """Into how many parts a text of up to `longest` rows is cut, where there are `programs` without cutting."""
    return max(1, min(ceil_div(longest, PART_ROWS), ceil_div(PROGRAMS, programs)))


def backward_triton(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, count: Tensor, keep: Tensor | None, mean: bool,
    added: Tensor | None, states: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """The dense gradients of `gather_backward`, in one launch."""
    batch, layers, hidden = grad.shape
    rows = torch.Size(shape).numel() // hidden
    grads = [grad.new_empty(shape) for _ in range(layers)]
    t = _tile("gather_backward", hidden, bool(states))
    blocks = ceil_div(hidden, t["BLOCK_D"])
    parts = _parts(batch * layers * blocks, shape[-2])
    strides = token_strides(states[0]) if states else (1, 0, 0)
    with torch.cuda.device_of(grad):
        _backward_kernel[(batch * parts, layers, blocks)](
            tuple(grads), tuple(states) or None, None if added is None else added.contiguous(), grad, starts, ends,
            count, keep if mean else None, rows, batch, *strides, parts, layers, hidden, not mean, **t,
        )  # fmt: skip
    return grads
