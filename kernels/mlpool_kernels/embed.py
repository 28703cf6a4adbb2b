"""Embed: from the pooler's last product to the embedding, in one launch.

    p = W2 ū + b2 + ȳ        v = base + gate ⊙ p        e = v / ‖v‖₂

W2ū [B,D], ȳ [B,D], base [B,D] -> e [B,D]. In a small pool the launches count, not the numbers: as operations of torch's
this is twenty of them, and as many in the backward. A program holds the row of one text; everything is float32 between
reading and writing. Where something traces, and on a CPU, it is torch's operations, which a compiler fuses by itself.

Source: arXiv 2409.02727, section 3.3; the residual around the pooler is mlpool's own (`MultiLayerPool`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import jit, power_of_2, tl, untraced, use_triton
from .sums import sum_parts
from .tiles import tile

# A row in the registers of one program.
LARGEST_HIDDEN = 8192


@jit
def _load(source, text, stride, column, inside):
    """Row `text` in float32, of a vector the same for all texts (stride 0), or zeros of None."""
    row = tl.zeros(column.shape, tl.float32)
    if source is not None:
        row = tl.load(source + text * stride + column, mask=inside, other=0.0).to(tl.float32)
    return row


@jit
def _row(product, bias, y_mean, base, gate, text, stride_base, column, inside, HIDDEN: tl.constexpr):
    """p and v of one text."""
    p = _load(product, text, HIDDEN, column, inside) + _load(bias, text, 0, column, inside)
    p += _load(y_mean, text, HIDDEN, column, inside)
    v = p
    if gate is not None:
        v = p * _load(gate, text, 0, column, inside)
    return p, v + _load(base, text, stride_base, column, inside)


@jit
def _length(v):
    """1 / max |v|, by which the squares stay within float32, and ‖v‖ in that scale."""
    scale = 1.0 / tl.maximum(tl.max(tl.abs(v), 0), 1e-37)
    scaled = v * scale
    return scale, tl.maximum(tl.sqrt(tl.sum(scaled * scaled, 0)), 1e-30)


@jit
def _embed_kernel(
    product, bias, y_mean, base, gate, out, stride_base,
    HIDDEN: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    _, v = _row(product, bias, y_mean, base, gate, text, stride_base, column, inside, HIDDEN)
    if NORMALIZE:
        scale, length = _length(v)
        v = v * scale / length
    tl.store(out + text * HIDDEN + column, v.to(out.dtype.element_ty), mask=inside)


@jit
def _embed_backward_kernel(
    product, bias, y_mean, base, gate, grad, dp, dproduct, dbase, dgate, stride_base,
    HIDDEN: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dgate: [B,D], the parts whose sum is the gate's gradient; dp likewise is the bias's and ȳ's."""
    text = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    place = text * HIDDEN + column
    p, v = _row(product, bias, y_mean, base, gate, text, stride_base, column, inside, HIDDEN)
    dv = _load(grad, text, HIDDEN, column, inside)
    if NORMALIZE:
        scale, length = _length(v)
        e = v * scale / length
        dv = (dv - e * tl.sum(e * dv, 0)) * (scale / length)
    if base is not None:
        tl.store(dbase + place, dv.to(dbase.dtype.element_ty), mask=inside)
    if gate is not None:
        tl.store(dgate + place, dv * p, mask=inside)
        dv = dv * _load(gate, text, 0, column, inside)
    tl.store(dp + place, dv, mask=inside)
    tl.store(dproduct + place, dv.to(dproduct.dtype.element_ty), mask=inside)


def _options(hidden: int) -> dict[str, int]:
    return {"BLOCK_D": power_of_2(hidden, 16), **tile("embed")}


def _stride(base: Tensor | None) -> int:
    return 0 if base is None else base.stride(0)


class _EmbedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: Tensor, bias: Tensor | None, y_mean: Tensor | None, base: Tensor | None,
        gate: Tensor | None, normalize: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        batch, hidden = product.shape
        out = product.new_empty(batch, hidden, dtype=dtype)
        with torch.cuda.device_of(product):
            _embed_kernel[(batch,)](
                product, bias, y_mean, base, gate, out, _stride(base), hidden, normalize, **_options(hidden)
            )
        ctx.save_for_backward(product, bias, y_mean, base, gate)
        ctx.normalize = normalize
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        product, bias, y_mean, base, gate = ctx.saved_tensors
        batch, hidden = product.shape
        dp, dproduct = product.new_empty(batch, hidden, dtype=torch.float32), torch.empty_like(product)
        dbase = None if base is None else base.new_empty(batch, hidden)
        dgate = None if gate is None else torch.empty_like(dp)
        with torch.cuda.device_of(product):
            _embed_backward_kernel[(batch,)](
                product, bias, y_mean, base, gate, grad.contiguous(), dp, dproduct, dbase, dgate, _stride(base), hidden,
                ctx.normalize, **_options(hidden),
            )  # fmt: skip
        parts = {} if bias is None else {"bias": dp}
        if dgate is not None:
            parts["gate"] = dgate
        # Of one dtype in the pools: one launch for both.
        dtype = torch.float32 if bias is None else bias.dtype
        sums = sum_parts(parts, batch, dtype) if parts else {}
        of_gate = None if gate is None else sums["gate"].to(gate.dtype)
        return dproduct, sums.get("bias"), None if y_mean is None else dp.to(y_mean.dtype), dbase, of_gate, None, None


def embed(
    product: Tensor, bias: Tensor, y_mean: Tensor, base: Tensor | None, gate: Tensor | None, normalize: bool,
    dtype: torch.dtype, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The embedding from what `pool.cross_attend` gives.

    Args:
        product: W2 ū [B, D], any floating dtype. bias: b2 [D]. y_mean: ȳ [B, D], float32 or wider.
        base: [B, D], what the pooled vector is added to; None for nothing. gate: [D], a factor of the pooled vector;
            None for 1. normalize: unit length. dtype: of the result. backend: "auto", "triton" or "torch".

    Returns: e [B, D] of `dtype`. Differentiable in all tensors.
    """
    tensors = (product, bias, y_mean, base, gate)
    if _one_launch(backend, *tensors) and (base is None or base.stride(-1) == 1):
        return _EmbedFunction.apply(product.contiguous(), bias, y_mean.contiguous(), base, gate, normalize, dtype)
    with torch.autocast(product.device.type, enabled=False):
        v = product.to(y_mean.dtype) + bias.to(y_mean.dtype) + y_mean
        if gate is not None:
            v = v * gate.to(v.dtype) if base is None else torch.addcmul(base.to(v.dtype), gate.to(v.dtype), v)
        elif base is not None:
            v = base.to(v.dtype) + v
        v = v.to(dtype)
        return unit(v, "torch") if normalize else v


def _one_launch(backend: str, *tensors: Tensor | None) -> bool:
    first = tensors[0]
    assert first is not None
    small = first.dim() == 2 and first.shape[-1] <= LARGEST_HIDDEN
    return small and use_triton(backend, *tensors) and untraced(tensors)


def unit(embedding: Tensor, backend: str = "auto") -> Tensor:
    """To length 1, along the last dimension. Of any finite size: by a power of two its squares are brought within range
    first, which changes no digit of an ordinary vector. Zero stays zero; NaN and infinity give NaN."""
    if _one_launch(backend, embedding):
        return _EmbedFunction.apply(embedding.contiguous(), None, None, None, None, True, embedding.dtype)
    wide = torch.promote_types(embedding.dtype, torch.float32)
    largest = torch.linalg.vector_norm(embedding.detach().to(wide), torch.inf, dim=-1, keepdim=True)
    tiny = torch.finfo(embedding.dtype).tiny
    bound = -math.log2(tiny)
    exponent = largest.log2().floor().clamp(-bound, bound)
    return F.normalize(embedding * torch.exp2(-exponent).to(embedding.dtype), dim=-1, eps=tiny)
