"""Contrast: each text's cosines to many others under a softmax, forward and backward; the scores never exist at once.

    c_p[i,j] = a_i[:d_p] · b_j[:d_p] / (‖a_i[:d_p]‖ ‖b_j[:d_p]‖)         for every prefix d_p, in one pass over D
    N[p,i]   = log Σ_{j allowed} exp(c_p[i,j] / τ)                        the partner left out
    P[p,i]   = c_p[i, partner_i] / τ
    loss     = log(1 + exp(N − P))                                        = −log of the partner's softmax share

rows a [N,D] and others b [M,D] -> N and P [P,N]. Not allowed are the partner itself, texts that are the same by their
keys, and texts whose cosine over all of D is above the row's bound. That the partner is apart makes the loss exact
where it is nearly zero, and lets a ring of processes add up N block by block: log Σ exp of all is that of the parts.

A launch computes tiles of products like any matrix product; only a row's log Σ exp leaves a tile. The backward computes
the tiles again and writes the weights H of a block of rows and others,

    H_p[i,j] = Σ_{q ≥ p} ∂loss/∂c_q[i,j] / (‖a_i[:d_q]‖ ‖b_j[:d_q]‖)

for the columns of D between d_{p-1} and d_p. The gradients are H b and Hᵀ a, plain matrix products, less each vector's
own direction, whose length Σ ∂loss/∂c · c the tiles add up. Kept between forward and backward: N. On a CPU, and for
float64, the same in torch (`contrast_torch.py`), by blocks that stay in the cache. Every sum has one order: bitwise the
same from run to run.

Source: arXiv 1807.03748 (InfoNCE), 2205.13147 (Matryoshka), 2410.17243 (tiles, and blocks of others in a ring).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrast_kernels import forward_triton, tile_of, weights_triton
from .contrast_texts import Texts, inverse_lengths, segments, texts_of
from .contrast_torch import forward_torch, weights_torch
from .runtime import direct, untraced, use_triton, wide_dtype

# Numbers of a block of scores, of the weights H that are alive at once on a GPU in bytes, and of what tiles leave.
CACHED_NUMBERS, CUDA_NUMBERS = 1 << 19, 1 << 26
WORKSPACE_BYTES = 128 << 20
PARTS = 1 << 22
# Beyond, log(1 + exp(x)) is x in float64 too.
LINEAR = 40.0


def _blocks(rows: int, others: int, step: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for first in range(0, rows, step[0]):
        for start in range(0, others, step[1]):
            yield slice(first, min(first + step[0], rows)), slice(start, min(start + step[1], others))


def _torch_step(device: torch.device, prefixes: int) -> tuple[int, int]:
    """Rows and others of a square block of scores."""
    side = math.isqrt((CACHED_NUMBERS if device.type == "cpu" else CUDA_NUMBERS) // prefixes)
    return max(1, side), max(1, side)


# --- forward -------------------------------------------------------------------------------------------------------


def _without_autocast(function: Any) -> Any:
    """Products take their operands' dtype, also where a backward runs inside autocast."""

    @wraps(function)
    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.amp.is_autocast_available(first.device.type):
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run


@_without_autocast
def forward(
    rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
    bound: Tensor | None, dims: Sequence[int], temperature: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """N and P [P,N], at least float32; −inf in N for a row with nothing left, 0 in P where no partner is here."""
    t, stages = texts_of(rows, others, partners, row_keys, other_keys, bound, dims)
    triton = use_triton(backend, rows, others)
    n, m, prefixes = len(rows), len(others), len(dims)
    logs = rows.new_full((prefixes, n), -math.inf, dtype=wide_dtype(rows))
    positives = torch.zeros_like(logs)
    step = _torch_step(rows.device, prefixes)
    if triton:
        step = (max(n, 1), tile_of(t, stages)["BLOCK_M"] * max(1, PARTS // max(1, prefixes * n)))
    for here, there in _blocks(n, m, step):
        run = forward_triton if triton else forward_torch
        part = run(t.block(here, there), stages, temperature, positives[:, here])
        logs[:, here] = torch.logaddexp(logs[:, here], part)
    return logs, positives


# --- backward ------------------------------------------------------------------------------------------------------


@_without_autocast
def backward(
    grad_logs: Tensor, grad_partners: Tensor, logs: Tensor, rows: Tensor, others: Tensor, partners: Tensor,
    row_keys: Tensor | None, other_keys: Tensor | None, bound: Tensor | None, dims: Sequence[int], temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of rows and others, at least float32, from those of N and P; logs: N over all others there are."""
    t, stages = texts_of(rows, others, partners, row_keys, other_keys, bound, dims)
    triton = use_triton(backend, rows, others)
    n, m, prefixes = len(rows), len(others), len(dims)
    wide = wide_dtype(rows)
    # H between -1 and 1, whatever the lengths of vectors and of the gradient: half precision has no more to give.
    grads = torch.stack([grad_logs, grad_partners]).to(wide)
    scale = grads.abs().amax() * t.row_scale.amax() * t.other_scale.amax()
    grads = grads / torch.where(scale > 0, scale, 1)
    drows, dothers = (torch.zeros_like(x, dtype=wide) for x in (t.rows, t.others))
    row_sums, other_sums = torch.zeros_like(logs), logs.new_zeros(prefixes, m)
    for here, there in _blocks(n, m, _triton_step(t, prefixes) if triton else _torch_step(rows.device, prefixes)):
        block = t.block(here, there)
        run = weights_triton if triton else weights_torch
        weights = run(
            block, stages, temperature, logs[:, here], grads[:, :, here], row_sums[:, here], other_sums[:, there]
        )
        for p in reversed(range(prefixes - 1)):
            weights[p] += weights[p + 1]
        a, b = block.rows.to(weights[0].dtype), block.others.to(weights[0].dtype)
        for h, part in zip(weights, segments(dims), strict=True):
            _add_product(drows[here, part], h, b[:, part])
            _add_product(dothers[there, part], h.T, a[:, part])
        del weights, h  # before there are those of the next block
    _project(drows, t.rows, row_sums, t.row_scale, dims)
    _project(dothers, t.others, other_sums, t.other_scale, dims)
    scale = scale / temperature
    return drows.mul_(scale), dothers.mul_(scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _project(grad: Tensor, x: Tensor, sums: Tensor, scale: Tensor, dims: Sequence[int]) -> None:
    """Take each vector's own direction out of its gradient, prefix by prefix: a longer vector has the same cosine."""
    along = sums * scale[: len(dims)].square()
    along = along.flip(0).cumsum(0).flip(0).neg()  # a column of D belongs to every prefix that reaches it
    for part, factor in zip(segments(dims), along, strict=True):
        for here, _ in _blocks(len(x), 1, (max(1, CUDA_NUMBERS // x.shape[1]), 1)):
            grad[here, part].addcmul_(x[here, part], factor[here, None])


def _triton_step(t: Texts, prefixes: int) -> tuple[int, int]:
    numbers = max(1, WORKSPACE_BYTES // (prefixes * t.rows.element_size()))
    others = min(len(t.others), 1 << (math.isqrt(numbers).bit_length() - 1))
    return max(1, numbers // max(1, others)), max(1, others)


# --- the op --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlpool::contrast", mutates_args=())
def _contrast_op(
    rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
    bound: Tensor | None, dims: list[int], temperature: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(rows, others, partners, row_keys, other_keys, bound, dims, temperature, backend)


@_contrast_op.register_fake
def _(rows, others, partners, row_keys, other_keys, bound, dims, temperature, backend):
    logs = rows.new_empty(len(dims), rows.shape[0], dtype=wide_dtype(rows))
    return logs, torch.empty_like(logs)


@torch.library.custom_op("mlpool::contrast_backward", mutates_args=())
def _contrast_backward_op(
    grad_logs: Tensor, grad_partners: Tensor, logs: Tensor, rows: Tensor, others: Tensor, partners: Tensor,
    row_keys: Tensor | None, other_keys: Tensor | None, bound: Tensor | None, dims: list[int], temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (rows, others, partners, row_keys, other_keys, bound)
    return backward(grad_logs, grad_partners, logs, *tensors, dims, temperature, backend)


@_contrast_backward_op.register_fake
def _(grad_logs, grad_partners, logs, rows, others, *rest):
    return tuple(x.new_empty(x.shape, dtype=wide_dtype(x)) for x in (rows, others))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dims, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(output[0], *tensors)


def _gradient(ctx: Any, grad_logs: Tensor, grad_partners: Tensor, run: Any = _contrast_backward_op) -> tuple[Any, ...]:
    logs, *tensors = ctx.saved_tensors
    grads = run(grad_logs, grad_partners, logs, *tensors, ctx.dims, ctx.temperature, ctx.backend)
    return *(g.to(x.dtype) for g, x in zip(grads, tensors, strict=False)), *(None,) * 7


_contrast_op.register_autograd(_gradient, setup_context=_setup)


class _ContrastFunction(torch.autograd.Function):
    """`_contrast_op` where nothing traces it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = forward(*arguments)
        _setup(ctx, arguments, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        of_logs, of_partners = grads
        return _gradient(ctx, of_logs, of_partners, backward)


@torch.no_grad()
def highest_allowed(
    rows: Tensor, others: Tensor, partners: Tensor, margin: float | None, factor: float | None
) -> Tensor:
    """[N]: the cosine above which a negative is taken for a second partner: the partner's + margin, or × factor.

    Of both the lower. Computed over all of D, row by row.
    """
    wide, width = wide_dtype(rows), rows.shape[1]
    cosines = rows.new_empty(len(rows), dtype=wide)
    step = max(1, CACHED_NUMBERS // width)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        a, b = rows[part].to(wide), others[partners[part]].to(wide)
        cosines[part] = (a * b).sum(1) * inverse_lengths(a, [width])[0] * inverse_lengths(b, [width])[0]
    return bound_of(cosines, margin, factor)


def bound_of(cosines: Tensor, margin: float | None, factor: float | None) -> Tensor:
    """The lower of the partners' cosines + margin and × factor, of those that are given."""
    bounds = [cosines + margin] if margin is not None else []
    bounds += [cosines * factor] if factor is not None else []
    return torch.stack(bounds).amin(0)


def losses(logs: Tensor, partners: Tensor) -> Tensor:
    """−log of the partner's share, from N and P of the same shape; 0 where no negative is left."""
    return F.softplus(logs - partners, threshold=LINEAR)


def contrast(
    rows: Tensor, others: Tensor, partners: Tensor, *, temperature: float, dims: Sequence[int] | None = None,
    row_keys: Tensor | None = None, other_keys: Tensor | None = None, margin: float | None = None,
    factor: float | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """InfoNCE of every row: −log of its partner's share in the softmax over all others that are not hidden.

    Args:
        rows: [N, D], others: [M, D], of one floating dtype and device, of any length but zero. Products take float32 as
            torch's switch for TF32 says; sums are of float32, or float64 for float64.
        partners: int64 [N], each row's positive among the others.
        temperature: τ above 0. dims: prefixes of D, rising, each a loss of its own; None: D alone.
        row_keys, other_keys: int64 [N, 2] and [M, 2], of the text itself and of its partner (of an other without one,
            its own again). Another is hidden whose own key is the row's or the row's partner's, or whose partner's key
            is the row's. Both or neither.
        margin, factor: hidden are others too whose cosine over all of D is above the partner's + margin, or × factor.
        backend: "auto", "triton" or "torch".

    Returns: [P, N], float32 or wider, for each prefix. Differentiable in rows and others.

    Raises: ValueError for shapes, prefixes or keys that do not fit.
    """
    dims = list(dims) if dims is not None else [rows.shape[-1]]
    _check(rows, others, partners, row_keys, other_keys, dims, temperature)
    judged = margin is not None or factor is not None
    bound = highest_allowed(rows, others, partners, margin, factor) if judged else None
    arguments = (rows, others, partners, row_keys, other_keys, bound, dims, float(temperature), backend)
    if direct([rows, others]):
        return losses(*forward(*arguments))
    return losses(*(_ContrastFunction.apply if untraced([rows, others]) else _contrast_op)(*arguments))


def _check(
    rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
    dims: Sequence[int], temperature: float,
) -> None:  # fmt: skip
    if rows.dim() != 2 or others.dim() != 2 or rows.shape[1] != others.shape[1] or rows.dtype != others.dtype:
        raise ValueError(
            f"contrast takes rows [N, D] and others [M, D] of one dtype, got {list(rows.shape)} {rows.dtype} and "
            f"{list(others.shape)} {others.dtype}"
        )
    if not dims or list(dims) != sorted(set(dims)) or dims[0] < 1 or dims[-1] > rows.shape[1]:
        raise ValueError(f"dims must be rising prefixes of the {rows.shape[1]} numbers of a vector, got {list(dims)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if partners.shape != rows.shape[:1] or partners.dtype != torch.int64:
        raise ValueError(f"partners must be int64 [{len(rows)}], got {partners.dtype} {list(partners.shape)}")
    keys = [None if k is None else (k.dtype, *k.shape) for k in (row_keys, other_keys)]
    if keys not in ([None, None], [(torch.int64, len(rows), 2), (torch.int64, len(others), 2)]):
        raise ValueError(f"row_keys and other_keys must be int64 [{len(rows)}, 2] and [{len(others)}, 2], got {keys}")
