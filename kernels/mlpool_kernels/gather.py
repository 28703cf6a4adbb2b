"""Gather: one row per text out of every layer's hidden states, the last token's or a mean of its tokens.

    last        X0[b, l] = h_l[last_b]
    mean        X0[b, l] = Σ_t keep[t] h_l[t] / count_b            t over the tokens of text b
    unit mean   X0[b, l] = Σ_t keep[t] h_l[t] / ‖h_l[t]‖ / count_b

A token of zeros adds nothing to the unit mean and gets no gradient; the others, with u = h / ‖h‖ and the gradient g of
their text, get (g − u (u·g)) / ‖h‖ / count. The backward reads the hidden states again and takes the lengths from them:
nothing is kept but the states themselves. The unit mean's norm is at most 1; a pool that wants another scale, say that
of a normed layer, √D, multiplies by it.

h_l: L tensors [B, T, D] (or packed [1, total, D] or [total, D]) -> X0 [B, L, D], one launch for all layers, no copy
of the hidden states. Backward writes one dense gradient per layer, each element once.

By Triton (`gather_kernels.py`) where all layers lie together, else layer by layer in torch (`gather_torch.py`).

Source: "Pooling And Attention" (arXiv 2409.02727), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gather_kernels import backward_triton, last_triton, mean_triton
from .gather_torch import backward_torch, forward_torch
from .runtime import direct, untraced, use_triton


def one_launch(states: Sequence[Tensor]) -> bool:
    """Whether the layers can be read by one launch: same device, dtype and strides, D contiguous."""
    first = states[0]
    device, dtype, strides = first.device, first.dtype, first.stride()
    return strides[-1] == 1 and all(s.device == device and s.dtype == dtype and s.stride() == strides for s in states)


def _forward(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, unit: bool = False,
) -> Tensor:  # fmt: skip
    first = states[0]
    if not (use_triton(backend, first) and one_launch(states)):
        return forward_torch(states, starts, ends, last, count, keep, mean, unit)
    if mean:
        return mean_triton(states, starts, ends, count, keep, unit)
    return last_triton(states, last)


def _backward(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor,
    keep: Tensor | None, mean: bool, backend: str, added: Tensor | None = None, states: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    grad = grad.contiguous()
    if use_triton(backend, grad, *states) and (not states or (one_launch(states) and states[0].device == grad.device)):
        return backward_triton(grad, shape, starts, ends if mean else last, count, keep, mean, added, states)
    return backward_torch(grad, shape, starts, ends, last, count, keep, mean, added, states)


@torch.library.custom_op("mlpool::gather", mutates_args=())
def _gather_op(
    states: list[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, unit: bool,
) -> Tensor:  # fmt: skip
    return _forward(states, starts, ends, last, count, keep, mean, backend, unit)


@_gather_op.register_fake
def _(states, starts, ends, last, count, keep, mean, backend, unit):
    return states[-1].new_empty(last.shape[0], len(states), states[0].shape[-1])


@torch.library.custom_op("mlpool::gather_backward", mutates_args=())
def _gather_backward_op(
    grad: Tensor, shape: list[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, added: Tensor | None, states: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return _backward(grad, shape, starts, ends, last, count, keep, mean, backend, added, states)


@_gather_backward_op.register_fake
def _(grad, shape, starts, ends, last, count, keep, mean, backend, added, states):
    return [grad.new_empty(shape) for _ in range(grad.shape[1])]


def _setup(ctx, inputs, output):
    states, *spans, keep, ctx.mean, ctx.backend, unit = inputs
    ctx.save_for_backward(*spans, keep, *(states if unit else ()))
    ctx.shape, ctx.devices = list(states[0].shape), [s.device for s in states]


def _gradient(ctx, grad, backward=_gather_backward_op):
    saved = ctx.saved_tensors  # asked for once: a checkpointed forward is unpacked a single time
    *spans, keep = saved[:5]
    grads = backward(grad, ctx.shape, *spans, keep, ctx.mean, ctx.backend, None, list(saved[5:]))
    return [g.to(device) for g, device in zip(grads, ctx.devices, strict=True)], *(None,) * 8


_gather_op.register_autograd(_gradient, setup_context=_setup)


class _GatherFunction(torch.autograd.Function):
    """`_gather_op` where nothing traces it."""

    @staticmethod
    def forward(ctx, arguments, *states):
        output = _forward(states, *arguments)
        _setup(ctx, (states, *arguments), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *_gradient(ctx, grad, _backward)[0]


def gather(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str = "auto", unit: bool = False,
) -> Tensor:  # fmt: skip
    """One row per text and layer.

    Args:
        states: L tensors of one shape, [B, T, D], [1, total, D] or [total, D], any floating dtype. Several devices
            work, a layer at a time; the result is on the last layer's.
        starts, ends, last, count: int64 [B], see `mlpool.pooling.tokens.Tokens`; keep: bool [rows] or None.
        mean: the mean of the kept tokens, accumulated in float32, instead of the last kept token.
        backend: "auto", "triton" or "torch". unit: with `mean`, every token is brought to unit length first.

    Returns: X0 [B, L, D] of the states' dtype. Differentiable in `states`, dense gradients.
    """
    if unit and not mean:
        raise ValueError("unit=True is for a mean; the last token alone is brought to unit length by whoever reads it")
    arguments = (starts, ends, last, count, keep, mean, backend, unit)
    if direct(states):
        return _forward(states, *arguments)
    if untraced(states):
        return _GatherFunction.apply(arguments, *states)
    return _gather_op(list(states), *arguments)


def gather_backward(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str = "auto", added: Tensor | None = None, states: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """The gradients of the L states, dense and of `shape`, from that of their rows.

    Args:
        grad: [B, L, D]. added: where L is 1, a gradient [rows, D] to which the state's own is added, out of place.
        states: the L states themselves for the unit mean, none for the others. The others are those of `gather`.
    """
    arguments = (grad, list(shape), starts, ends, last, count, keep, mean, backend, added, list(states))
    # Torch's own operations can be traced and differentiated again; a kernel cannot, and its op says so.
    plain = direct([grad, added, *states]) or not use_triton(backend, grad)
    return (_backward if plain else _gather_backward_op)(*arguments)
