"""Mix: the values' sum under the attention, the residual latents and the feed-forward's norm, forward and backward.

    Y = Σ_h A_h V_h Woᵀ_h + Z        N = LN3(Y)        ȳ = mean_r(Y), with a mix of layers m + mean_r(Y − Z)

A [B,n,H·R], X [B,n,D] -> N [B,R,D], ȳ [B,D]. The output projection commutes with the sum over keys, so the values
come in one of three exact forms (`plan.py` picks the cheapest):

    absorbed   VO_h = X (Wo_h Wv_h)ᵀ       Wo_h Wv_h [H,D,D] once per weight update; one product
    early      VO_h = (X Wv_hᵀ) Wo_hᵀ      Wo on the n rows of the keys, not on the R rows of the latents
    late       Y = concat_h(A_h X Wv_hᵀ) Woᵀ   as written in the paper; wins for long texts

For up to 128 latents and few keys, mixing, residual and mean are one launch, a program for every text and block of D;
there the early VO_h is made in the program's registers and never written. The norm, which wants whole rows, is that of
`rows.py`: Y is written and read once, which costs less than mixing twice. Its backward is two matrix products around
one launch, a program for every text and head:

    dO = dY Wo      dA_h = V_h dO_hᵀ, dS_h its softmax's gradient, dV_h = A_h dO_h, O_h = A_hᵀ V_h      dWo = dYᵀ O

Source: arXiv 2409.02727, section 3.3, equations 4 and 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import MIX_LATENTS
from .rows import NORM_EPS, Norm, norm_rows_triton
from .runtime import ceil_div, dot_options, jit, power_of_2, product_by_head, tl, wide_dtype
from .tiles import tile


@jit
def _finish(
    y, latents, base, y_mean, y_out, text, column, inside, R,
    HIDDEN: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the latents and writes a block of columns of Y and of ȳ."""
    latent = tl.arange(0, BLOCK_R)
    mask = (latent < R)[:, None] & inside[None, :]
    z = tl.load(latents + latent[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
    place = text * HIDDEN + column
    if base is not None:
        mean = tl.load(base + place, mask=inside, other=0.0) + tl.sum(tl.where(mask, y, 0.0), 0) / R
        y += z
    else:
        y += z
        mean = tl.sum(tl.where(mask, y, 0.0), 0) / R
    tl.store(y_mean + place, mean, mask=inside)
    target = y_out + (text * R + latent)[:, None] * HIDDEN + column[None, :]
    tl.store(target, y.to(y_out.dtype.element_ty), mask=mask)


@jit
def _mix_kernel(
    attention, values, latents, base, y_mean, y_out, rows_k, R,
    HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of columns of Y = Aᵀ [R, n·H] · VO [n·H, D] + Z, and of its mean over latents."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    latent = tl.arange(0, BLOCK_R)
    y = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, rows_k, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        row = text * rows_k + k
        weight = attention + row[None, :] * R + latent[:, None]
        a = tl.load(weight, mask=(k < rows_k)[None, :] & (latent < R)[:, None], other=0.0)
        value = values + row[:, None] * HIDDEN + column[None, :]
        v = tl.load(value, mask=(k < rows_k)[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            a, v = a.to(tl.float32), v.to(tl.float32)
        y = tl.dot(a, v, y, input_precision=PRECISION)
    _finish(y, latents, base, y_mean, y_out, text, column, inside, R, HIDDEN, BLOCK_R)


@jit
def _mix_heads_kernel(
    attention, values, output_weight, latents, base, y_mean, y_out, keys, R,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same from V [B·n, H, d] and Wo [D, H·d], head by head; BLOCK_K holds the keys and BLOCK_H a head."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    latent = tl.arange(0, BLOCK_R)
    key = tl.arange(0, BLOCK_K)
    unit = tl.arange(0, BLOCK_H)
    row = text * keys + key
    y = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for head in range(HEADS):
        own = unit < HEAD_DIM
        value = values + (row[:, None] * HEADS + head) * HEAD_DIM + unit[None, :]
        v = tl.load(value, mask=(key < keys)[:, None] & own[None, :], other=0.0)
        out = output_weight + column[None, :].to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM + unit[:, None]
        w = tl.load(out, mask=own[:, None] & inside[None, :], other=0.0)
        weight = attention + (row[None, :] * HEADS + head) * R + latent[:, None]
        a = tl.load(weight, mask=(key < keys)[None, :] & (latent < R)[:, None], other=0.0)
        if UPCAST:
            a, v, w = a.to(tl.float32), v.to(tl.float32), w.to(tl.float32)
        vo = tl.dot(v, w, input_precision=PRECISION)
        if UPCAST:
            vo = vo.to(values.dtype.element_ty).to(tl.float32)
        y = tl.dot(a, vo.to(a.dtype), y, input_precision=PRECISION)
    _finish(y, latents, base, y_mean, y_out, text, column, inside, R, HIDDEN, BLOCK_R)


@jit
def _mix_backward_kernel(
    attention, values, grad, dattention, dscores, dvalues, outputs, keys, R,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One text and head: from dO [B,R,H·d] the gradients of scores and values, and O [B,R,H·d] again."""
    text = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    latent = tl.arange(0, BLOCK_R)
    key = tl.arange(0, BLOCK_K)
    unit = tl.arange(0, BLOCK_H)
    own = (unit < HEAD_DIM)[None, :]
    row = ((text * keys + key) * HEADS + head)[:, None]
    of_keys = (key < keys)[:, None]
    scored = of_keys & (latent < R)[None, :]
    place = row * R + latent[None, :]
    value = row * HEAD_DIM + unit[None, :]
    out = ((text * R + latent) * HEADS + head)[:, None] * HEAD_DIM + unit[None, :]
    kept = (latent < R)[:, None] & own
    a = tl.load(attention + place, mask=scored, other=0.0)
    v = tl.load(values + value, mask=of_keys & own, other=0.0)
    d = tl.load(grad + out, mask=kept, other=0.0)
    if UPCAST:
        a, v, d = a.to(tl.float32), v.to(tl.float32), d.to(tl.float32)
    o = tl.dot(tl.trans(a), v, input_precision=PRECISION)
    tl.store(outputs + out, o.to(outputs.dtype.element_ty), mask=kept)
    dv = tl.dot(a, d, input_precision=PRECISION)
    tl.store(dvalues + value, dv.to(dvalues.dtype.element_ty), mask=of_keys & own)
    da = tl.dot(v, tl.trans(d), input_precision=PRECISION)
    if dattention is not None:
        da += tl.load(dattention + place, mask=scored, other=0.0).to(tl.float32)
    weight = a.to(tl.float32)
    ds = weight * (da - tl.sum(weight * da, 0)[None, :])
    if dscores is not None:
        tl.store(dscores + place, ds.to(dscores.dtype.element_ty), mask=scored)


class Values(NamedTuple):
    """What is mixed, of one form: v is V [B·n, H, d], absorbed None; vo is VO [B·n, H, D], late and by heads None."""

    v: Tensor | None
    vo: Tensor | None


def one_launch(latents: int, form: str) -> bool:
    """Whether mixing, residual and mean can be one launch: all latents in one tile."""
    return form != "late" and latents <= MIX_LATENTS


def values(
    keys: Tensor, value_weight: Tensor, output_weight: Tensor | None, heads: int, form: str, heads_in_kernel: bool
) -> Values:
    """The values of X [B,n,D].

    Args:
        value_weight: Wv [I, D], absorbed: Wo_h Wv_h [H·D, D]. output_weight: Wo [D, I] or None.
        heads_in_kernel: VO is left to the kernel.
    """
    v = (keys.flatten(0, 1) @ value_weight.T).unflatten(1, (heads, -1))
    if form == "absorbed":
        return Values(None, v)
    if form == "late" or heads_in_kernel:
        return Values(v, None)
    assert output_weight is not None
    return Values(v, _early(v, output_weight))


def _early(v: Tensor, output_weight: Tensor) -> Tensor:
    return product_by_head(v, _by_head(output_weight, v.shape[1]).transpose(1, 2))


def _by_head(output_weight: Tensor, heads: int) -> Tensor:
    """Wo [D, H·d] -> Wo_h [H, D, d], a view."""
    return output_weight.unflatten(1, (heads, -1)).transpose(0, 1)


def values_backward(
    grads: Tensor, keys: Tensor, v: Tensor | None, value_weight: Tensor, output_weight: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dVO, or dV where Wo acts late [B·n, H, ·] -> dX [B·n, D], dWv (or of the absorbed product), dWo acting early."""
    dv, dwo = grads, None
    if form == "early":
        assert output_weight is not None
        assert v is not None
        heads = v.shape[1]
        dv = product_by_head(grads, _by_head(output_weight, heads))
        dwo = torch.empty_like(output_weight)
        by_head, v_by_head = (t.transpose(0, 1) if t.is_cuda else t.transpose(0, 1).contiguous() for t in (grads, v))
        torch.bmm(by_head.transpose(1, 2), v_by_head, out=_by_head(dwo, heads))
    dv = dv.flatten(1)
    return dv @ value_weight, dv.T @ keys.flatten(0, 1), dwo


def mix(
    attention: Tensor, mixed: Values, output_weight: Tensor | None, latents: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, base: Tensor | None, form: str, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A [B,n,H·R], the values and m [B,D] or None -> N [B,R,D], ȳ [B,D] (at least float32), Y [B,R,D]."""
    if triton and one_launch(len(latents), form):
        return _mix_triton(attention, mixed, output_weight, latents, norm_weight, norm_bias, base)
    y = mixed_latents(attention, mixed, output_weight, latents, form)
    normed, *_ = norm_latents(y, norm_weight, norm_bias)
    y_mean = y.mean(1, dtype=wide_dtype(y))
    if base is not None:
        # Less what the latents alone would give, all texts the same; rounded as in Y.
        y_mean = base + (y_mean - latents.to(y.dtype).mean(0, dtype=y_mean.dtype))
    return normed, y_mean, y


def mixed_latents(attention: Tensor, mixed: Values, output_weight: Tensor | None, latents: Tensor, form: str) -> Tensor:
    """Y [B,R,D] by plain matrix products."""
    batch, num_latents = attention.shape[0], len(latents)
    z = latents.to(attention.dtype)
    if form == "late":
        assert output_weight is not None
        assert mixed.v is not None
        return (head_outputs(attention, mixed.v, num_latents) @ output_weight.T).add_(z)
    vo = mixed.vo
    if vo is None:
        assert output_weight is not None
        assert mixed.v is not None
        vo = _early(mixed.v, output_weight)
    by_latent = attention.reshape(batch, -1, num_latents).transpose(1, 2)
    return torch.baddbmm(z.expand(batch, -1, -1), by_latent, vo.view(batch, -1, latents.shape[1]))


def _split_heads(attention: Tensor, v: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
    """A as [B,H,R,n] and V as [B,H,n,d], views."""
    batch, heads = attention.shape[0], v.shape[1]
    a = attention.view(batch, -1, heads, num_latents).permute(0, 2, 3, 1)
    return a, v.view(batch, -1, heads, v.shape[2]).transpose(1, 2)


def head_outputs(attention: Tensor, v: Tensor, num_latents: int) -> Tensor:
    """concat_h(A_h V_h) [B,R,I] of the late form."""
    a, v = _split_heads(attention, v, num_latents)
    return (a @ v).transpose(1, 2).flatten(2)


def _mix_triton(
    attention: Tensor, mixed: Values, output_weight: Tensor | None, latents: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, base: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, keys, _), (num_latents, hidden) = attention.shape, latents.shape
    y = attention.new_empty(batch, num_latents, hidden)
    y_mean = attention.new_empty(batch, hidden, dtype=torch.float32)
    t = tile("mix" if mixed.vo is not None else "mix_heads", hidden, wide=attention.dtype == torch.float32)
    blocks, block_r = ceil_div(hidden, t["BLOCK_D"]), power_of_2(num_latents, 16)
    given, sizes = (latents, base, y_mean, y), (hidden, blocks, block_r)
    with torch.cuda.device_of(attention):
        if mixed.vo is not None:
            rows_k = keys * mixed.vo.shape[1]
            _mix_kernel[(batch * blocks,)](
                attention, mixed.vo, *given, rows_k, num_latents, *sizes, **t, **dot_options(attention.dtype)
            )
        else:
            assert mixed.v is not None
            heads, head_dim = mixed.v.shape[1:]
            _mix_heads_kernel[(batch * blocks,)](
                attention, mixed.v, output_weight, *given, keys, num_latents, heads, head_dim, *sizes,
                BLOCK_K=power_of_2(keys, 16), BLOCK_H=power_of_2(head_dim, 16), **t, **dot_options(attention.dtype),
            )  # fmt: skip
    _, normed, _ = norm_rows_triton([y], None, Norm(None, None, norm_weight, norm_bias), y.dtype)
    return normed, y_mean, y


def mix_heads_backward(
    doutputs: Tensor, attention: Tensor, v: Tensor, num_latents: int, dattention: Tensor | None, scored: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Triton: dO [B,R,I], A and V -> dS [B,n,H·R] where `scored`, dV [B·n,H,d] and O [B,R,I], in one launch.

    dattention: a gradient of A besides, or None.
    """
    (batch, keys, _), (_, heads, head_dim) = attention.shape, v.shape
    dscores = torch.empty_like(attention) if scored else None
    dvalues, outputs = torch.empty_like(v), torch.empty_like(doutputs)
    given = None if dattention is None else dattention.contiguous()
    block_r, block_k = power_of_2(num_latents, 16), power_of_2(keys, 16)
    t = tile("mix_backward")
    t["num_warps"] = max(t["num_warps"], min(16, block_r * block_k // 1024))  # a head's scores are held whole
    with torch.cuda.device_of(v):
        _mix_backward_kernel[(batch * heads,)](
            attention, v, doutputs, given, dscores, dvalues, outputs, keys, num_latents, heads, head_dim, block_r,
            block_k, power_of_2(head_dim, 16), **t, **dot_options(attention.dtype),
        )  # fmt: skip
    return dscores, dvalues, outputs


def norm_latents(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N = LN3(Y) with the statistics its backward needs. A GPU takes weights of Y's dtype alone."""
    dtype = y.dtype if y.is_cuda else wide_dtype(y)
    return torch.native_layer_norm(y, y.shape[-1:], weight.to(dtype), bias.to(dtype), NORM_EPS)


def norm_latents_backward(
    dnormed: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dN -> dY, dLN3 weight, dLN3 bias.

    On a CPU in float32: torch adds the weights' gradients up in the dtype of Y there, and in bfloat16 they lose digits
    with every row.
    """
    dtype = y.dtype if y.is_cuda else wide_dtype(y)
    dy, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(dtype), y.to(dtype), y.shape[-1:], mean, rstd, weight.to(dtype), bias.to(dtype), [True, True, True]
    )
    return dy.to(y.dtype), dweight, dbias


def mix_backward(
    dy: Tensor, attention: Tensor, mixed: Values, output_weight: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Torch: dY [B,R,D] -> dA [B,n,H·R], dVO or dV [B·n,H,·], dWo of the late form."""
    batch, num_latents, hidden = dy.shape
    if form != "late":
        assert mixed.vo is not None
        vo = mixed.vo.view(batch, -1, hidden)
        by_key = attention.reshape(batch, -1, num_latents)
        da = torch.bmm(vo, dy.transpose(1, 2)).view_as(attention)
        return da, torch.bmm(by_key, dy).view_as(mixed.vo), None
    assert output_weight is not None
    assert mixed.v is not None
    a, v = _split_heads(attention, mixed.v, num_latents)
    outputs = head_outputs(attention, mixed.v, num_latents)
    dwo = dy.flatten(0, 1).T @ outputs.flatten(0, 1)
    douts = (dy @ output_weight).unflatten(2, (v.shape[1], -1)).transpose(1, 2)
    da = (v @ douts.transpose(-1, -2)).transpose(1, 2).reshape(attention.shape)
    dv = (a.transpose(-1, -2) @ douts).transpose(1, 2).reshape(mixed.v.shape)
    return da, dv, dwo
