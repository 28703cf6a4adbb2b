"""Gather: one row per text out of every layer's hidden states, the last token's or the mean of its tokens.

    last   X0[b, l] = h_l[last_b]
    mean   X0[b, l] = Σ_t keep[t] h_l[t] / count_b          t over the tokens of text b

h_l: L tensors [B, T, D] (or packed [1, total, D] or [total, D]) -> X0 [B, L, D], one launch for all layers, no copy
of the hidden states. Backward writes one dense gradient per layer, each element once.

The layers are passed to the kernel as a tuple of pointers and selected inside it: no table in memory, so no copy to
the device and nothing to keep alive, and the loads stay 16 bytes wide (tried: 24 layers, sm_90).

Source: "Pooling And Attention" (arXiv 2409.02727), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime import ceil_div, direct, jit, tl, use_triton
from .tiles import tile


@jit
def _select(states, index, LAYERS: tl.constexpr):
    """The pointer of layer `index` (a scalar or a block of them) out of a tuple of pointers."""
    pointer = states[0] + index * 0
    for i in tl.static_range(1, LAYERS):
        pointer = tl.where(index == i, states[i], pointer)
    return pointer


@jit
def _mean_kernel(
    states, starts, ends, keep, count, out, tokens, stride_text, stride_token,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    base = _select(states, layer, LAYERS)
    start, end = tl.load(starts + text), tl.load(ends + text)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        kept = row < end
        if MASKED:
            kept = kept & (tl.load(keep + row, mask=kept, other=0) != 0)
        # Rows left out are not read at all: NaN in padding stays in padding.
        offset = (row // tokens) * stride_text + (row % tokens) * stride_token
        x = tl.load(base + offset[:, None] + column[None, :], mask=kept[:, None] & inside[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.load(count + text).to(tl.float32)
    tl.store(out + (text * LAYERS + layer) * HIDDEN + column, mean.to(out.dtype.element_ty), mask=inside)


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
    grads, grad_out, text_of_row, scale, rows,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row t of layer l's gradient is scale[t] · grad_out[text of t, l]; every element is written once."""
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = row < rows
    factor = tl.load(scale + row, mask=valid, other=0.0)
    text = tl.load(text_of_row + row, mask=valid, other=0)
    used = (valid & (factor != 0))[:, None] & (column < HIDDEN)[None, :]
    source = grad_out + (text[:, None] * LAYERS + layer) * HIDDEN + column[None, :]
    grad = tl.load(source, mask=used, other=0.0).to(tl.float32) * factor[:, None]
    target = _select(grads, layer, LAYERS) + row[:, None] * HIDDEN + column[None, :]
    tl.store(target, grad.to(grad_out.dtype.element_ty), mask=valid[:, None] & (column < HIDDEN)[None, :])


def token_strides(state: Tensor) -> tuple[int, int, int]:
    """(T, stride of a text, stride of a token) of a [B, T, D] or packed [total, D] tensor, in elements."""
    if state.dim() == 2:
        return state.shape[0], 0, state.stride(0)
    return state.shape[1], state.stride(0), state.stride(1)


def one_launch(states: Sequence[Tensor]) -> bool:
    """Whether the layers can be read by one launch: same device, dtype and strides, D contiguous."""
    first = states[0]
    return first.stride(-1) == 1 and all(
        s.device == first.device and s.dtype == first.dtype and s.stride() == first.stride() for s in states
    )


def _forward(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str,
) -> Tensor:  # fmt: skip
    first = states[0]
    if not (use_triton(backend, first) and one_launch(states)):
        # Layer by layer; which text a row counts for is worked out once.
        text = text_of_row(first.shape[:-1].numel(), starts, ends, keep) if mean else None
        return torch.stack([_pool_torch(s, last, count, text).to(states[-1].device) for s in states], 1)
    hidden, layers, batch = first.shape[-1], len(states), len(last)
    out = first.new_empty(batch, layers, hidden)
    tokens, stride_text, stride_token = token_strides(first)
    with torch.cuda.device_of(first):
        if mean:
            t = tile("mean", hidden=hidden)
            grid = (batch, layers, ceil_div(hidden, t["BLOCK_D"]))
            _mean_kernel[grid](
                tuple(states), starts, ends, keep, count, out, tokens, stride_text, stride_token,
                layers, hidden, keep is not None, **t,
            )  # fmt: skip
        else:
            t = tile("last", hidden=hidden)
            _last_kernel[(batch, layers)](
                tuple(states), last, out, tokens, stride_text, stride_token, layers, hidden, **t
            )
    return out


def _pool_torch(state: Tensor, last: Tensor, count: Tensor, text: Tensor | None) -> Tensor:
    """One layer: [B, D]; the mean where `text` [rows] says what each row counts for, else the last token."""
    device, tokens = state.device, state.shape[-2]
    if text is None:
        last = last.to(device)
        return state[last] if state.dim() == 2 else state[last // tokens, last % tokens]
    flat = state.flatten(0, -2)
    # Rows left out are summed apart: a product with a mask would let NaN in the padding through.
    sums = flat.new_zeros(len(count) + 1, flat.shape[1], dtype=torch.promote_types(flat.dtype, torch.float32))
    sums.index_add_(0, text.to(device), flat.to(sums.dtype))
    return (sums[:-1] / count.to(device)[:, None]).to(state.dtype)


def text_of_row(rows: int, starts: Tensor, ends: Tensor, keep: Tensor | None) -> Tensor:
    """int64 [rows]: the text that each flat row counts for, B for rows that are left out."""
    row = torch.arange(rows, device=ends.device)
    text = torch.searchsorted(ends, row, right=True)
    left_out = row < starts[0]
    if keep is not None:
        left_out = left_out | ~keep
    return text.masked_fill(left_out, len(ends))


def _row_scale(
    rows: int, starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None, mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For each flat row its text [rows] int64 and the factor [rows] its text's gradient reaches it with."""
    if not mean:
        row = torch.arange(rows, device=last.device)
        text = torch.searchsorted(last, row).clamp(max=len(last) - 1)
        return text, (row == last[text]).to(dtype)
    text = text_of_row(rows, starts, ends, keep)
    inverse = torch.cat([1 / count.to(dtype), count.new_zeros(1, dtype=dtype)])
    return text.clamp(max=len(ends) - 1), inverse[text]


def _backward(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor,
    keep: Tensor | None, mean: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """grad [B, L, D] -> L dense gradients of `shape`."""
    layers, hidden = grad.shape[1:]
    grad = grad.contiguous()
    rows = torch.Size(shape).numel() // hidden
    if not use_triton(backend, grad):
        if mean:
            text = text_of_row(rows, starts, ends, keep)
            each = torch.cat([grad / count[:, None, None], grad.new_zeros(1, layers, hidden)])
            return [each[:, layer].index_select(0, text).view(shape) for layer in range(layers)]
        zeros = [grad.new_zeros(rows, hidden) for _ in range(layers)]
        return [zero.index_copy_(0, last, grad[:, layer]).view(shape) for layer, zero in enumerate(zeros)]
    wide = torch.promote_types(grad.dtype, torch.float32)
    text, scale = _row_scale(rows, starts, ends, last, count, keep, mean, wide)
    grads = [grad.new_empty(shape) for _ in range(layers)]
    t = tile("gather_backward", hidden=hidden)
    grid = (ceil_div(rows, t["BLOCK_T"]), layers, ceil_div(hidden, t["BLOCK_D"]))
    with torch.cuda.device_of(grad):
        _backward_kernel[grid](tuple(grads), grad, text, scale, rows, layers, hidden, **t)
    return grads


@torch.library.custom_op("mlpool::gather", mutates_args=())
def _gather_op(
    states: list[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str,
) -> Tensor:  # fmt: skip
    return _forward(states, starts, ends, last, count, keep, mean, backend)


@_gather_op.register_fake
def _(states, starts, ends, last, count, keep, mean, backend):
    return states[-1].new_empty(last.shape[0], len(states), states[0].shape[-1])


@torch.library.custom_op("mlpool::gather_backward", mutates_args=())
def _gather_backward_op(
    grad: Tensor, shape: list[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    return _backward(grad, shape, starts, ends, last, count, keep, mean, backend)


@_gather_backward_op.register_fake
def _(grad, shape, starts, ends, last, count, keep, mean, backend):
    return [grad.new_empty(shape) for _ in range(grad.shape[1])]


def _setup(ctx, inputs, output):
    states, *spans, keep, ctx.mean, ctx.backend = inputs
    ctx.save_for_backward(*spans, keep)
    ctx.shape, ctx.devices = list(states[0].shape), [s.device for s in states]


def _gradient(ctx, grad):
    *spans, keep = ctx.saved_tensors
    grads = _gather_backward_op(grad, ctx.shape, *spans, keep, ctx.mean, ctx.backend)
    return [g.to(device) for g, device in zip(grads, ctx.devices, strict=True)], *(None,) * 7


_gather_op.register_autograd(_gradient, setup_context=_setup)


def gather(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """One row per text and layer.

    Args:
        states: L tensors of one shape, [B, T, D], [1, total, D] or [total, D], any floating dtype. Several devices
            work, a layer at a time; the result is on the last layer's.
        starts, ends, last, count: int64 [B], see `mlpool.pooling.tokens.Tokens`; keep: bool [rows] or None.
        mean: the mean of the kept tokens, accumulated in float32, instead of the last kept token.
        backend: "auto", "triton" or "torch".

    Returns: X0 [B, L, D] of the states' dtype. Differentiable in `states`, dense gradients.
    """
    arguments = (list(states), starts, ends, last, count, keep, mean, backend)
    return (_forward if direct(states) else _gather_op)(*arguments)
