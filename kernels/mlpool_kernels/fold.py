"""Fold: what depends on the weights alone, queries and absorbed values, once per weight update.

    Q_h = LN2(Z) Wq_hᵀ / √d        Q̃_h = Q_h Wk_h        Wo_h Wv_h

Z [R,D] -> Q [H,R,d] or Q̃ [H·R,D]; Wv [I,D] and Wo [D,I] -> [H·D,D]. Products of the library's and one norm. On a GPU
absorbing has its gradients by hand: as autograd keeps them, the scale and a copy for the sake of strides are launches
of their own, and a small pool's training is bound by those.

Source: arXiv 2409.02727, section 3.3, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rows import NORM_EPS
from .runtime import INTERPRETED, untraced, wide_dtype


def fold_queries(
    latents: Tensor, norm_weight: Tensor, norm_bias: Tensor, query_weight: Tensor, key_weight: Tensor | None, heads: int
) -> Tensor:
    """The text-independent half of the scores, scaled by 1/√d.

    Args:
        latents: Z [R,D]. norm_*: LN2. query_weight: Wq [I,D]. key_weight: Wk [I,D] to absorb it, or None.

    Returns: Q̃ [H·R, D] with `key_weight`, Q [H, R, d] without; of query_weight's dtype. Differentiable.
    """
    tensors = (latents, norm_weight, norm_bias, query_weight)
    if key_weight is not None and (latents.is_cuda or INTERPRETED) and untraced((*tensors, key_weight)):
        return _AbsorbFunction.apply(*tensors, key_weight, heads)
    z, *_ = _normed_latents(*tensors[:3], query_weight.dtype)
    q = _split(z.to(query_weight.dtype) @ query_weight.T, heads)
    q = q * q.shape[-1] ** -0.5
    if key_weight is None:
        return q.contiguous()
    return torch.bmm(q, key_weight.unflatten(0, (heads, -1))).flatten(0, 1)


def _normed_latents(
    latents: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LN2(Z) for products of `dtype`, in the dtype that it was computed in, and the norm's statistics."""
    # On a GPU and of one dtype the norm's own float32 inside is as good, and spares a small pool's training the casts.
    one = latents.is_cuda and latents.dtype == weight.dtype == bias.dtype == dtype
    wide = dtype if one else wide_dtype(latents)
    return torch.native_layer_norm(latents.to(wide), latents.shape[-1:], weight.to(wide), bias.to(wide), NORM_EPS)


def _split(q: Tensor, heads: int) -> Tensor:
    """[R, H·d] -> [H, R, d], a view."""
    return q.unflatten(1, (heads, -1)).transpose(0, 1)


def _scaled_product(a: Tensor, b: Tensor, head_dim: int, out: Tensor | None = None) -> Tensor:
    """a b / √d, one product a head."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out
    return out.baddbmm_(a, b, beta=0, alpha=head_dim**-0.5)


class _AbsorbFunction(torch.autograd.Function):
    """`fold_queries` with absorbed keys by hand: no launch but its norm's and its products', which take the scale."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, norm_weight: Tensor, norm_bias: Tensor, query_weight: Tensor, key_weight: Tensor,
        heads: int,
    ) -> Tensor:  # fmt: skip
        z, mean, rstd = _normed_latents(latents, norm_weight, norm_bias, query_weight.dtype)
        ctx.wide, z = z.dtype, z.to(query_weight.dtype)
        q = z @ query_weight.T
        ctx.save_for_backward(latents, norm_weight, norm_bias, query_weight, key_weight, z, mean, rstd, q)
        ctx.heads = heads
        keys = key_weight.unflatten(0, (heads, -1))
        return _scaled_product(_split(q, heads), keys, q.shape[1] // heads).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents, norm_weight, norm_bias, query_weight, key_weight, z, mean, rstd, q = ctx.saved_tensors
        grad, keys = grad.unflatten(0, (ctx.heads, -1)), key_weight.unflatten(0, (ctx.heads, -1))
        dq, head_dim = torch.empty_like(q), keys.shape[1]
        _scaled_product(grad, keys.transpose(1, 2), head_dim, out=_split(dq, ctx.heads))
        dkeys = _scaled_product(_split(q, ctx.heads).transpose(1, 2), grad, head_dim)
        dz, *norm = (t.to(ctx.wide) for t in (dq @ query_weight, latents, norm_weight, norm_bias))
        of_norm = torch.ops.aten.native_layer_norm_backward(
            dz, norm[0], latents.shape[-1:], mean, rstd, *norm[1:], [True, True, True]
        )
        of_norm = (g.to(w.dtype) for g, w in zip(of_norm, (latents, norm_weight, norm_bias), strict=True))
        return *of_norm, dq.T @ z, dkeys.flatten(0, 1), None


def fold_values(value_weight: Tensor, output_weight: Tensor, heads: int) -> Tensor:
    """Wo_h Wv_h for every head: Wv [I,D], Wo [D,I] -> [H·D, D]. Differentiable."""
    by_head = output_weight.unflatten(1, (heads, -1)).transpose(0, 1)
    return torch.bmm(by_head, value_weight.unflatten(0, (heads, -1))).flatten(0, 1)
