"""Mix: the values' sum under the attention, the residual latents and the feed-forward's norm.

    Y = Σ_h A_h V_h Woᵀ_h + Z        N = LN3(Y)        ȳ = mean_r(Y)

A [B,n,H·R], X [B,n,D] -> N [B,R,D], ȳ [B,D]. The output projection commutes with the sum over keys, so the values
come in one of three exact forms (`plan.py` picks the cheapest):

    absorbed   VO_h = X (Wo_h Wv_h)ᵀ       Wo_h Wv_h [H,D,D] once per weight update; one product
    early      VO_h = (X Wv_hᵀ) Wo_hᵀ      Wo on the n rows of the keys, not on the R rows of the latents
    late       Y = concat_h(A_h X Wv_hᵀ) Woᵀ   as written in the paper; wins for long texts

For up to 128 latents and few keys, mixing, residual and mean are one launch, a program for every text and block of D,
and the norm, which wants whole rows, is attend's: Y is written and read once, which costs less than mixing twice.

Source: arXiv 2409.02727, section 3.3, equations 4 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import NORM_EPS, attend_one_launch
from .runtime import ceil_div, dot_options, jit, power_of_2, product_by_head, tl
from .tiles import tile


@jit
def _mix_kernel(
    attention, values, latents, y_mean, y_out, rows_k, R,
    HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of columns of Y = Aᵀ [R, n·H] · VO [n·H, D] + Z, and of its mean over latents."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    latent = tl.arange(0, BLOCK_R)
    mask = (latent < R)[:, None] & inside[None, :]
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
    z = latents + latent[:, None] * HIDDEN + column[None, :]
    y += tl.load(z, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_mean + text * HIDDEN + column, tl.sum(tl.where(mask, y, 0.0), 0) / R, mask=inside)
    target = y_out + (text * R + latent)[:, None] * HIDDEN + column[None, :]
    tl.store(target, y.to(y_out.dtype.element_ty), mask=mask)


def values(keys: Tensor, value_weight: Tensor, output_weight: Tensor | None, heads: int, form: str) -> list[Tensor]:
    """What is mixed: [VO [B·n, H, D]] (absorbed), [VO, V] (early), [V [B·n, H, d]] (late).

    Args:
        keys: X [B, n, D]. value_weight: Wv [I, D], absorbed: Wo_h Wv_h [H·D, D]. output_weight: Wo [D, I] or None.
    """
    v = (keys.flatten(0, 1) @ value_weight.T).unflatten(1, (heads, -1))
    if form != "early":
        return [v]
    assert output_weight is not None
    return [product_by_head(v, _by_head(output_weight, heads).transpose(1, 2)), v]


def _by_head(output_weight: Tensor, heads: int) -> Tensor:
    """Wo [D, H·d] -> Wo_h [H, D, d], a view."""
    return output_weight.unflatten(1, (heads, -1)).transpose(0, 1)


def values_backward(
    grads: Tensor, keys: Tensor, mixed: list[Tensor], value_weight: Tensor, output_weight: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dVO or dV [B·n, H, ·] -> dX [B·n, D], dWv (or of the absorbed product), dWo where it acted early."""
    dv, dwo = grads, None
    if form == "early":
        assert output_weight is not None
        v, heads = mixed[1], mixed[1].shape[1]
        dv = product_by_head(grads, _by_head(output_weight, heads))
        dwo = torch.empty_like(output_weight)
        by_head, v_by_head = (t.transpose(0, 1) if t.is_cuda else t.transpose(0, 1).contiguous() for t in (grads, v))
        torch.bmm(by_head.transpose(1, 2), v_by_head, out=_by_head(dwo, heads))
    dv = dv.flatten(1)
    return dv @ value_weight, dv.T @ keys.flatten(0, 1), dwo


def mix(
    attention: Tensor, mixed: list[Tensor], output_weight: Tensor | None, latents: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, form: str, triton: bool, store_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A [B,n,H·R] and what `values` gave -> N [B,R,D], ȳ [B,D] (at least float32), Y [B,R,D] where kept."""
    if triton and one_launch(latents, form):
        return _mix_triton(attention, mixed[0], latents, norm_weight, norm_bias, store_y)
    y = mixed_latents(attention, mixed, output_weight, latents, form)
    normed, *_ = norm_latents(y, norm_weight, norm_bias)
    return normed, y.mean(1, dtype=torch.promote_types(y.dtype, torch.float32)), y if store_y else None


def one_launch(latents: Tensor, form: str) -> bool:
    """Whether mixing, residual and mean can be one launch: all latents in one tile."""
    return form != "late" and len(latents) <= 128


def mixed_latents(
    attention: Tensor, mixed: list[Tensor], output_weight: Tensor | None, latents: Tensor, form: str
) -> Tensor:
    """Y [B,R,D] by plain matrix products."""
    batch, num_latents = attention.shape[0], len(latents)
    z = latents.to(attention.dtype)
    if form == "late":
        assert output_weight is not None
        return z + head_outputs(attention, mixed[0], num_latents) @ output_weight.T
    by_latent = attention.reshape(batch, -1, num_latents).transpose(1, 2)
    return torch.baddbmm(z.expand(batch, -1, -1), by_latent, mixed[0].view(batch, -1, latents.shape[1]))


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
    attention: Tensor, vo: Tensor, latents: Tensor, norm_weight: Tensor, norm_bias: Tensor, store_y: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, (num_latents, hidden) = attention.shape[0], latents.shape
    y = attention.new_empty(batch, num_latents, hidden)
    y_mean = attention.new_empty(batch, hidden, dtype=torch.float32)
    t = tile("mix", hidden, wide=attention.dtype == torch.float32)
    blocks = ceil_div(hidden, t["BLOCK_D"])
    with torch.cuda.device_of(attention):
        _mix_kernel[(batch * blocks,)](
            attention, vo, latents, y_mean, y, attention.shape[1] * vo.shape[1], num_latents, hidden, blocks,
            BLOCK_R=power_of_2(num_latents, 16), **t, **dot_options(attention.dtype),
        )  # fmt: skip
    _, normed, _ = attend_one_launch([y], None, None, norm_weight, norm_bias, None, y.dtype)
    return normed, y_mean, y if store_y else None


def norm_latents(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N = LN3(Y) with the statistics its backward needs. A GPU takes weights of Y's dtype alone."""
    dtype = y.dtype if y.is_cuda else torch.promote_types(y.dtype, torch.float32)
    return torch.native_layer_norm(y, y.shape[-1:], weight.to(dtype), bias.to(dtype), NORM_EPS)


def norm_latents_backward(
    dnormed: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dN -> dY, dLN3 weight, dLN3 bias.

    On a CPU in float32: torch adds the weights' gradients up in the dtype of Y there, and in bfloat16 they lose digits
    with every row.
    """
    dtype = y.dtype if y.is_cuda else torch.promote_types(y.dtype, torch.float32)
    dy, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(dtype), y.to(dtype), y.shape[-1:], mean, rstd, weight.to(dtype), bias.to(dtype), [True, True, True]
    )
    return dy.to(y.dtype), dweight, dbias


def mix_backward(
    dy: Tensor, attention: Tensor, mixed: list[Tensor], output_weight: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dY [B,R,D] -> dA [B,n,H·R], dVO or dV [B·n,H,·], dWo of the late form."""
    batch, num_latents, hidden = dy.shape
    if form != "late":
        vo = mixed[0].view(batch, -1, hidden)
        by_key = attention.reshape(batch, -1, num_latents)
        da = torch.bmm(vo, dy.transpose(1, 2)).view_as(attention)
        return da, torch.bmm(by_key, dy).view_as(mixed[0]), None
    assert output_weight is not None
    a, v = _split_heads(attention, mixed[0], num_latents)
    outputs = head_outputs(attention, mixed[0], num_latents)
    dwo = dy.flatten(0, 1).T @ outputs.flatten(0, 1)
    douts = (dy @ output_weight).unflatten(2, (v.shape[1], -1)).transpose(1, 2)
    da = (v @ douts.transpose(-1, -2)).transpose(1, 2).reshape(attention.shape)
    dv = (a.transpose(-1, -2) @ douts).transpose(1, 2).reshape(mixed[0].shape)
    return da, dv, dwo
