"""Rows: what the pooler reads of each row of X0, and what it stands on, forward and backward.

    x = √D h / ‖h‖              with a mix of layers, else x = h
    m = Σ_l w_l x_l             the mix, one row a text
    X = LN(x + E)

h [B,n,D] -> X [B,n,D] and m [B,D]. A row of zeros stays zero and gets no gradient; one whose squares are no numbers of
float32 becomes NaN, for which nobody has to wait. Only h is kept for the backward: lengths, means and variances are
computed again from the row, which a program of the backward holds whole anyway,

    dx = LN'(dX) + w_l dm       dh = √D (dx − u (u·dx)) / ‖h‖       u = h / ‖h‖

and of what is summed over texts (E, w, the norm's weights) every program leaves its part to `sums.py`. The same kernel
is the feed-forward norm's backward, whose rows Y = mixed + Z share Z as X0's share E, and every latent the mean's dȳ.

Source: arXiv 2409.02727, section 3.3, equation 3; the mix and the one length are mlpool's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gather_kernels import _select, token_strides
from .runtime import ceil_div, jit, power_of_2, tl, wide_dtype
from .tiles import whole_rows

NORM_EPS = 1e-5
# Programs that fill a large GPU (132 multiprocessors) some times over: a backward's rows are split among so many.
PROGRAMS = 512


@jit
def _begin(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS: tl.constexpr):
    """Where the rows of one text begin: layer by layer with `rows`, else row by row of X0."""
    layer = layer.to(tl.int64)
    if rows is None:
        base = states[0] + text * stride_text + layer * stride_token
    else:
        row = tl.load(rows + text)
        base = _select(states, layer, LAYERS) + (row // tokens) * stride_text + (row % tokens) * stride_token
    return base


@jit
def _factor(square, HIDDEN: tl.constexpr):
    """√D / ‖h‖ of rows with these sums of squares: 0 of zeros, NaN of what has left the range of float32."""
    inside = tl.where(square > 0, square, 1.0)
    factor = tl.where(square < float("inf"), HIDDEN**0.5 / tl.sqrt(inside), float("nan"))
    return tl.where(square == 0, 0.0, factor)


@jit
def _shift(x, column, layer_weights, layer, mask, HIDDEN: tl.constexpr):
    """x + E."""
    if layer_weights is not None:
        x += tl.load(layer_weights + layer[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@jit
def _scale(x, mean, rstd, column, norm_weight, norm_bias, HIDDEN: tl.constexpr):
    inside = column < HIDDEN
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@jit
def _inverse_deviation(variance, eps):
    """NaN where the squares have left the range of float32: the rows would come out as zeros, and in silence."""
    return tl.where(variance < float("inf"), 1.0 / tl.sqrt(variance + eps), float("nan"))


@jit
def _norm_kernel(
    states, rows, mix_weights, layer_weights, norm_weight, norm_bias, x0, keys, mixed, tokens, stride_text,
    stride_token, eps,
    LAYERS: tl.constexpr, NUM_KEYS: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """X, X0 where it is gathered, and mixed [B, BLOCKS, D], this program's part of m; whole rows, read once."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    layer = (tl.program_id(0) % BLOCKS) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    mask = (layer < NUM_KEYS)[:, None] & inside[None, :]
    base = _begin(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS)
    out = (text * NUM_KEYS + layer)[:, None] * HIDDEN + column[None, :]
    raw = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
    if rows is not None:
        tl.store(x0 + out, raw, mask=mask)
    x = raw.to(tl.float32)
    if mix_weights is not None:
        x *= _factor(tl.sum(x * x, 1), HIDDEN)[:, None]
        share = tl.load(mix_weights + layer, mask=layer < NUM_KEYS, other=0.0).to(tl.float32)
        part = tl.sum(x * share[:, None], 0)
        tl.store(mixed + tl.program_id(0).to(tl.int64) * HIDDEN + column, part, mask=inside)
    x = _shift(x, column, layer_weights, layer, mask, HIDDEN)
    mean = tl.sum(x, 1) / HIDDEN
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = _inverse_deviation(tl.sum(centred * centred, 1) / HIDDEN, eps)
    x = _scale(x, mean, rstd, column, norm_weight, norm_bias, HIDDEN)
    tl.store(keys + out, x.to(keys.dtype.element_ty), mask=mask)


@jit
def _norm_backward_kernel(
    grad, rows, mix_weights, layer_weights, norm_weight, added, drows, of_layers, of_weight, of_bias, of_mix, texts,
    stride_text, stride_row, eps,
    NUM_KEYS: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One of PARTS equal parts of the texts, and of each its row of one key.

    added [B,D]: of a mix the gradient of m; without one it goes to every row alike, by 1 / NUM_KEYS. of_layers,
    of_weight and of_bias [PARTS, NUM_KEYS, D] and of_mix [PARTS, NUM_KEYS] are sums over this program's texts,
    of_layers with what was added where SHARED.
    """
    key = tl.program_id(0) % NUM_KEYS
    part = tl.program_id(0) // NUM_KEYS
    column = tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    size = (texts + PARTS - 1) // PARTS
    first = part * size
    stop = tl.minimum(first + size, texts)
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / NUM_KEYS
    if mix_weights is not None:
        share = tl.load(mix_weights + key).to(tl.float32)
    sum_rows = tl.zeros([BLOCK_D], tl.float32)
    sum_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_mix = tl.zeros([BLOCK_T], tl.float32)
    for done in range(first, stop, BLOCK_T):
        text = (done + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (text < stop)[:, None] & inside[None, :]
        x = tl.load(rows + text[:, None] * stride_text + key * stride_row + column[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if mix_weights is not None:
            factor = _factor(tl.sum(x * x, 1), HIDDEN)
            x *= factor[:, None]
        y = x
        if layer_weights is not None:
            y += tl.load(layer_weights + key * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        mean = tl.sum(y, 1) / HIDDEN
        y = tl.where(mask, y - mean[:, None], 0.0)
        rstd = _inverse_deviation(tl.sum(y * y, 1) / HIDDEN, eps)
        y *= rstd[:, None]
        place = (text * NUM_KEYS + key)[:, None] * HIDDEN + column[None, :]
        d = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        sum_weight += tl.sum(d * y, 0)
        sum_bias += tl.sum(d, 0)
        d *= weight[None, :]
        d = (d - (tl.sum(d, 1) / HIDDEN)[:, None] - y * (tl.sum(d * y, 1) / HIDDEN)[:, None]) * rstd[:, None]
        d = tl.where(mask, d, 0.0)
        if not SHARED:
            sum_rows += tl.sum(d, 0)
        if added is not None:
            more = tl.load(added + text[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if mix_weights is not None:
                sum_mix += tl.sum(x * more, 1)
            d += more * share
        if SHARED:
            sum_rows += tl.sum(d, 0)
        if mix_weights is not None:
            d = (d - x * (tl.sum(x * d, 1) / HIDDEN)[:, None]) * factor[:, None]
        tl.store(drows + place, d.to(drows.dtype.element_ty), mask=mask)
    target = tl.program_id(0) * HIDDEN + column
    tl.store(of_weight + target, sum_weight, mask=inside)
    tl.store(of_bias + target, sum_bias, mask=inside)
    if of_layers is not None:
        tl.store(of_layers + target, sum_rows, mask=inside)
    if of_mix is not None:
        tl.store(of_mix + tl.program_id(0), tl.sum(sum_mix, 0))


class Norm(NamedTuple):
    """The weights on rows [B,n,D]: mix [n] or None, layers E [n,D] or None, the norm's weight and bias [D]."""

    mix: Tensor | None
    layers: Tensor | None
    weight: Tensor
    bias: Tensor


class NormGradients(NamedTuple):
    """Of `Norm`, sums over the texts; by Triton the parts of them, float32 [P, ·], which `sums.sum_parts` adds up."""

    mix: Tensor | None
    layers: Tensor | None
    weight: Tensor
    bias: Tensor


def place(states: Sequence[Tensor], rows: Tensor | None) -> tuple[Sequence[Tensor], Tensor, tuple[int, int, int]]:
    """How kernels find their rows: the states, X0 (new where it is to be gathered), and T with two strides.

    states: L tensors [B, T, D] with `rows` int64 [B], the flat row of each text, or one X0 [B, n, D] without.
    """
    first = states[0]
    if rows is not None:
        return states, first.new_empty(len(rows), len(states), first.shape[-1]), token_strides(first)
    first = first if first.stride(-1) == 1 else first.contiguous()
    return [first], first, (1, first.stride(0), first.stride(1))


def norm_rows_triton(
    states: Sequence[Tensor], rows: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """X0 [B,n,D], X [B,n,D] of `dtype`, and with a mix m [B,D] in float32, in one launch; see `place`."""
    states, x0, where = place(states, rows)
    batch, num_keys, hidden = x0.shape
    keys = x0.new_empty(x0.shape, dtype=dtype)
    t, block_l, block_d = whole_rows("norm", hidden)
    blocks = ceil_div(num_keys, block_l)
    mixed = None if norm.mix is None else x0.new_empty(batch, blocks, hidden, dtype=torch.float32)
    with torch.cuda.device_of(x0):
        _norm_kernel[(batch * blocks,)](
            tuple(states), rows, *norm, x0, keys, mixed, *where, NORM_EPS, len(states), num_keys, hidden, blocks,
            block_l, block_d, **t,
        )  # fmt: skip
    return x0, keys, None if mixed is None else mixed.sum(1) if blocks > 1 else mixed.flatten(1)


def norm_rows_backward_triton(
    grad: Tensor, x0: Tensor, norm: Norm, added: Tensor | None, *, summed: bool, shared: bool = False
) -> tuple[Tensor, NormGradients]:
    """dX [B,n,D] -> dh [B,n,D], and the parts of the weights' gradients.

    added: with a mix dm [B,D], else what every row gets by 1/n. summed: the sum of the rows over texts is wanted, as
    `layers`; shared: with what was added.
    """
    x0 = x0 if x0.stride(-1) == 1 else x0.contiguous()
    shape = x0.shape
    if not summed and added is None:
        # Nothing is of one key alone, and there may be a key a token: the texts share the work, row by row.
        grad, x0 = (t.reshape(-1, 1, shape[2]) for t in (grad, x0))
    batch, num_keys, hidden = x0.shape
    parts = power_of_2(min(batch, ceil_div(PROGRAMS, num_keys)))  # a power of two: few sizes to compile for
    drows = grad.new_empty(x0.shape, dtype=x0.dtype)
    of_weight = grad.new_empty(2 + summed, parts, num_keys, hidden, dtype=torch.float32)
    of_mix = None if norm.mix is None else of_weight.new_empty(parts, num_keys)
    of_layers = of_weight[2] if summed else None
    t, block_t, block_d = whole_rows("norm_backward", hidden)
    with torch.cuda.device_of(x0):
        _norm_backward_kernel[(parts * num_keys,)](
            grad, x0, norm.mix, norm.layers, norm.weight, added, drows, of_layers, of_weight[0], of_weight[1], of_mix,
            batch, x0.stride(0), x0.stride(1), NORM_EPS, num_keys, hidden, parts, shared, block_t, block_d, **t,
        )  # fmt: skip
    layers = None if of_layers is None else of_layers.flatten(1)
    return drows.view(shape), NormGradients(of_mix, layers, of_weight[0].flatten(0, 1), of_weight[1].flatten(0, 1))


def unit_rows(x0: Tensor) -> Tensor:
    """Torch: every row of X0 [B,n,D] at length √D, its entries about 1; float32 at least. Differentiable."""
    return _unit(x0)[0]


def _unit(x0: Tensor) -> tuple[Tensor, Tensor]:
    """And the factor of each row [B,n,1]."""
    x = x0.to(wide_dtype(x0))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    length = length.masked_fill(length.isinf(), torch.nan).masked_fill(length == 0, torch.inf)
    factor = x.shape[-1] ** 0.5 / length
    return x * factor, factor


def mix_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Torch: Σ_l w_l x_l of weights [n] and rows [B,n,D] -> [B,D]. Products and a sum, which autocast leaves alone."""
    return (weights[:, None] * rows).sum(1)


def norm_rows(x0: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Torch: X [B,n,D], computed in float32 or wider and rounded to `dtype`, and with a mix m [B,D]."""
    wide = wide_dtype(x0)
    x = x0.to(wide) if norm.mix is None else unit_rows(x0)
    mixed = None if norm.mix is None else mix_rows(norm.mix, x)
    h = x if norm.layers is None else x + norm.layers.to(wide)
    keys = torch.nn.functional.layer_norm(h, h.shape[-1:], norm.weight.to(wide), norm.bias.to(wide), NORM_EPS)
    return keys.to(dtype), mixed


def norm_rows_backward(
    grad: Tensor, x0: Tensor, norm: Norm, dmixed: Tensor | None
) -> tuple[Tensor, NormGradients]:  # fmt: skip
    """Torch: dX [B,n,D] and with a mix dm [B,D] -> dh [B,n,D] and the weights' gradients; X0 is all that was kept."""
    wide = wide_dtype(x0)
    x, factor = (x0.to(wide), None) if norm.mix is None else _unit(x0)
    h = x if norm.layers is None else x + norm.layers.to(wide)
    weight, bias = norm.weight.to(wide), norm.bias.to(wide)
    _, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, NORM_EPS)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), h, h.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    dlayers, dmix = None if norm.layers is None else dx.sum(0), None
    if norm.mix is not None and dmixed is not None and factor is not None:
        dmix = torch.bmm(x, dmixed[:, :, None]).sum((0, 2))
        dx = torch.addcmul(dx, norm.mix.to(wide)[:, None], dmixed[:, None])
        dx = torch.addcmul(dx, x, (x * dx).sum(-1, keepdim=True), value=-1 / x.shape[-1]).mul_(factor)
    return dx.to(x0.dtype), NormGradients(dmix, dlayers, dweight, dbias)
