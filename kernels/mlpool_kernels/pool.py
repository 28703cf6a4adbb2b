"""The whole pool: hidden states or gathered rows -> one vector per text, forward and backward.

    X0 -> ū, ȳ        chunk.py        attention, mixing, feed-forward, texts by texts
    W2 ū, ȳ -> p      embed.py        the mean over latents commutes with W2 and the residual: p = W2 ū + b2 + ȳ

p [B,D] equals the mean over latents of the reference's Y' (`reference.py`). What depends on the weights alone, the
queries Q or Q̃ and the absorbed values, is computed outside (`fold.py`), once per weight update. `plan.py` picks among
the exact forms. Texts are taken in chunks, so that what lies between X0 and ū never exists for the whole batch unless
the backward is to keep it.

The op is registered with torch (`mlpool::pool`), so torch.compile sees one node. Where nothing traces it is called
directly, with gradients as an autograd function: a registered op costs more than a small pool's launches.

Source: arXiv 2409.02727, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk import NUM_WEIGHTS, Weights, again, backward_chunk, forward_chunk, pack, sizes, unpack
from .embed import embed
from .gather import _backward as gather_backward
from .gather import _gather_backward_op
from .plan import Plan, Sizes, by_heads
from .runtime import direct, untraced, use_triton, wide_dtype

# Intermediates alive at once where nothing is kept for the backward.
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 768 << 20}


def _texts_per_chunk(s: Sizes, w: Weights) -> int:
    columns = s.heads * s.latents
    numbers = s.keys * (s.hidden + 2 * columns + 2 * s.inner + s.heads * s.hidden) + 3 * s.latents * s.hidden
    limit = WORKSPACE_BYTES.get(w.latents.device.type, WORKSPACE_BYTES["cpu"])
    return max(1, limit // (numbers * w.ff_in_weight.element_size()))


def _chunks(s: Sizes, w: Weights, plan: Plan) -> Iterator[slice]:
    """Slices of texts: all at once where the intermediates are kept anyway."""
    step = _texts_per_chunk(s, w) if plan.memory == "recompute" else s.batch
    for first in range(0, s.batch, step):
        yield slice(first, first + step)


def _select_texts(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, part: slice
) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
    mask = None if key_mask is None else key_mask[part]
    return (states, rows[part], mask) if rows is not None else ([states[0][part]], None, mask)


def _forward(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    backend: str, output_attentions: bool,
) -> list[Tensor]:  # fmt: skip
    """[ū, ȳ, A or empty, X0 or empty, *kept]; empty stands for what nobody needs."""
    triton = use_triton(backend, states[0], *w)
    keep = plan.memory != "recompute"
    with torch.autocast(states[0].device.type, enabled=False):
        parts = []
        for part in _chunks(sizes(states, rows, w, heads), w, plan):
            u, y_mean, x0, saved = forward_chunk(*_select_texts(states, rows, key_mask, part), w, heads, plan, triton)
            # An op's outputs must not share memory: every absent one is an empty tensor of its own.
            attention = saved.attention if keep or output_attentions else u.new_empty(0)
            parts.append((u, y_mean, attention, x0 if rows is not None else u.new_empty(0)))
        joined = [p[0] if len(p) == 1 else torch.cat(p) for p in zip(*parts, strict=True)]
    return joined + pack(saved) if keep else joined


def _backward(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, key_mask: Tensor | None, w: Weights,
    heads: int, plan: Plan, backend: str, attention: Tensor, kept: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """[dX0, the gradient of every weight in the order of `Weights`]; empty for a weight that is absent."""
    triton = use_triton(backend, x0, *w)
    s = sizes([x0], None, w, heads)
    dx0: list[Tensor] = []
    total: dict[str, Tensor] = {}
    with torch.autocast(x0.device.type, enabled=False):
        chunks = list(_chunks(s, w, plan))
        dtype = w.latents.dtype if len(chunks) == 1 else torch.float32  # of sums that are added up once more
        for part in chunks:
            if plan.memory == "recompute":
                saved = again(*_select_texts([x0], None, key_mask, part), w, heads, plan, triton)
            else:
                saved = unpack(kept, attention, w, s, plan, triton)
            da = None if dattention is None else dattention[part]
            dx, grads = backward_chunk(du[part], dy_mean[part], da, x0[part], w, plan, saved, triton, dtype)
            dx0.append(dx)
            for name, grad in grads.items():
                total[name] = grad if name not in total else total[name].add_(grad)
    out = [dx0[0] if len(dx0) == 1 else torch.cat(dx0)]
    for name, weight in w._asdict().items():
        if weight is None:
            out.append(x0.new_empty(0))
        else:
            grad = total[name].reshape(weight.shape) if name in total else torch.zeros_like(weight)
            out.append(grad.to(weight.dtype))
    return out


@torch.library.custom_op("mlpool::pool", mutates_args=())
def _pool_op(
    states: list[Tensor], rows: Tensor | None, key_mask: Tensor | None,
    layer_weights: Tensor | None, key_norm_weight: Tensor, key_norm_bias: Tensor, queries: Tensor | None,
    key_weight: Tensor | None, value_weight: Tensor, output_weight: Tensor | None, latents: Tensor,
    ff_norm_weight: Tensor, ff_norm_bias: Tensor, ff_in_weight: Tensor, ff_in_bias: Tensor,
    mix_weights: Tensor | None, heads: int, plan: str, backend: str, output_attentions: bool,
) -> list[Tensor]:  # fmt: skip
    w = Weights(
        layer_weights, key_norm_weight, key_norm_bias, queries, key_weight, value_weight, output_weight, latents,
        ff_norm_weight, ff_norm_bias, ff_in_weight, ff_in_bias, mix_weights,
    )  # fmt: skip
    return _forward(states, rows, key_mask, w, heads, Plan.parse(plan), backend, output_attentions)


@_pool_op.register_fake
def _(states, rows, key_mask, *rest):
    w, (heads, text, backend, output_attentions) = Weights(*rest[:NUM_WEIGHTS]), rest[NUM_WEIGHTS:]
    plan, first = Plan.parse(text), states[0]
    s = sizes(states, rows, w, heads)
    triton = use_triton(backend, first, *w)
    dtype = w.ff_in_weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    keep = plan.memory != "recompute"
    columns = s.heads * s.latents

    def like(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return first.new_empty(shape, dtype=dtype)

    out = [like(s.batch, s.width), like(s.batch, s.hidden, dtype=wide)]
    out.append(like(s.batch, s.keys, columns) if keep or output_attentions else like(0))
    out.append(like(s.batch, s.keys, s.hidden, dtype=first.dtype) if rows is not None else like(0))
    if not keep:
        return out
    n = s.batch * s.keys
    out.append(like(s.batch, s.keys, s.hidden))
    if w.queries is not None and w.key_weight is not None:
        out.append(like(n, s.heads, w.key_weight.shape[0] // heads))
    if plan.values != "absorbed":
        out.append(like(n, s.heads, s.head_dim))
    if plan.values != "late" and not (triton and by_heads(s, plan)):
        out.append(like(n, s.heads, s.hidden))
    out.append(like(s.batch, s.latents, s.hidden))
    if plan.memory == "save":
        out += [like(s.batch, s.latents, s.hidden)] * (triton and plan.mix == "kernel")
        out.append(like(s.batch, s.latents, 2 * s.width))
    return out


@torch.library.custom_op("mlpool::pool_backward", mutates_args=())
def _pool_backward_op(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, key_mask: Tensor | None,
    layer_weights: Tensor | None, key_norm_weight: Tensor, key_norm_bias: Tensor, queries: Tensor | None,
    key_weight: Tensor | None, value_weight: Tensor, output_weight: Tensor | None, latents: Tensor,
    ff_norm_weight: Tensor, ff_norm_bias: Tensor, ff_in_weight: Tensor, ff_in_bias: Tensor,
    mix_weights: Tensor | None, heads: int, plan: str, backend: str, attention: Tensor, kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    w = Weights(
        layer_weights, key_norm_weight, key_norm_bias, queries, key_weight, value_weight, output_weight, latents,
        ff_norm_weight, ff_norm_bias, ff_in_weight, ff_in_bias, mix_weights,
    )  # fmt: skip
    return _apart(
        _backward(du, dy_mean, dattention, x0, key_mask, w, heads, Plan.parse(plan), backend, attention, kept)
    )


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """An op's outputs must not share memory; the sums of one launch (`sums.sum_parts`) do."""
    seen: set[int] = set()
    made = []
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr()
        made.append(tensor.clone() if tensor.numel() and place in seen else tensor)
        seen.add(place)
    return made


@_pool_backward_op.register_fake
def _(du, dy_mean, dattention, x0, key_mask, *rest):
    weights = [x0.new_empty(0) if t is None else torch.empty_like(t) for t in rest[:NUM_WEIGHTS]]
    return [torch.empty_like(x0), *weights]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    states, rows, key_mask = inputs[:3]
    weights = inputs[3 : 3 + NUM_WEIGHTS]
    ctx.heads, ctx.plan, ctx.backend, ctx.output_attentions = inputs[3 + NUM_WEIGHTS :]
    ctx.shape, ctx.num_states = list(states[0].shape), len(states)
    x0 = states[0] if rows is None else output[3]
    ctx.save_for_backward(rows, key_mask, x0, *weights, output[2], *output[4:])
    # What is kept for the backward is no output to differentiate; without gradients it must not look like one.
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], of_states: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of the states, where they are wanted, and of the weights; None of a weight that is absent."""
    rows, key_mask, x0, *rest = ctx.saved_tensors
    w, attention, kept = Weights(*rest[:NUM_WEIGHTS]), rest[NUM_WEIGHTS], rest[NUM_WEIGHTS + 1 :]
    du, dy_mean, dattention, dx0_direct = grads[:4]
    batch = x0.shape[0]
    if du is None:
        du = w.ff_in_weight.new_zeros(batch, w.ff_in_weight.shape[0] // 2)
    if dy_mean is None:
        dy_mean = x0.new_zeros(batch, x0.shape[-1], dtype=wide_dtype(w.ff_in_weight))
    if not ctx.output_attentions:
        dattention = None
    given, plain = (du.contiguous(), dy_mean.contiguous(), dattention, x0, key_mask), untraced((du, x0, *w))
    if plain:
        dx0, *dweights = _backward(*given, w, ctx.heads, Plan.parse(ctx.plan), ctx.backend, attention, kept)
    else:
        dx0, *dweights = _pool_backward_op(*given, *w, ctx.heads, ctx.plan, ctx.backend, attention, kept)
    present = [grad if weight is not None else None for grad, weight in zip(dweights, w, strict=True)]
    if not of_states:
        return [None] * ctx.num_states, present
    if rows is None:
        return [dx0], present
    dx0 = dx0 if dx0_direct is None else dx0 + dx0_direct
    scatter = gather_backward if plain else _gather_backward_op
    return list(scatter(dx0, ctx.shape, rows, rows, rows, rows, None, False, ctx.backend, None, [])), present


def _op_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[0]
    of_states, of_weights = _gradients(ctx, grads, any(needed) if isinstance(needed, list | tuple) else bool(needed))
    return of_states, None, None, *of_weights, None, None, None, None


_pool_op.register_autograd(_op_gradient, setup_context=_setup)


class _PoolFunction(torch.autograd.Function):
    """`_pool_op` where nothing traces it. tensors: the states, then the weights."""

    @staticmethod
    def forward(
        ctx: Any, num_states: int, rows: Tensor | None, key_mask: Tensor | None, options: tuple[Any, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        states, weights, (heads, plan, backend, output_attentions) = tensors[:num_states], tensors[num_states:], options
        out = _forward(states, rows, key_mask, Weights(*weights), heads, plan, backend, output_attentions)
        _setup(ctx, (states, rows, key_mask, *weights, heads, str(plan), backend, output_attentions), out)
        return out[0], out[1], out[2] if output_attentions else None, out[3] if rows is not None else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of_states, of_weights = _gradients(ctx, grads, any(ctx.needs_input_grad[4 : 4 + ctx.num_states]))
        return None, None, None, None, *of_states, *of_weights


def cross_attend(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, ff_out_weight: Tensor,
    heads: int, plan: Plan, backend: str = "auto", output_attentions: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The trainable pooler over n keys per text, up to its last product; `embed.py` adds up what it returns.

    Args:
        states: [X0] of shape [B, n, D], or with `rows` the L hidden states [B, T, D] (packed [total, D]) of one device,
            dtype and stride, read by the kernels themselves (Triton only).
        rows: int64 [B], the flat row of each text's last token, increasing; or None.
        key_mask: bool [B, n], False for padding; or None.
        w, ff_out_weight W2 [D,F]: the weights, in the forms that `plan` names.
        heads: H. backend: "auto", "triton" or "torch".

    Returns: W2 ū [B, D] of W2's dtype; ȳ [B, D], float32 or wider, with a mix of layers m + mean_r(Y − Z); A
    [B, n, H·R] of the compute dtype where `output_attentions`; X0 where `rows` were gathered. Differentiable in states
    and every weight.
    """
    out: Sequence[Any]
    if direct([*states, *w]):
        out = _forward(states, rows, key_mask, w, heads, plan, backend, output_attentions)
    elif untraced([*states, *w]):
        options = (heads, plan, backend, output_attentions)
        out = _PoolFunction.apply(len(states), rows, key_mask, options, *states, *w)
    else:
        out = _pool_op(list(states), rows, key_mask, *w, heads, str(plan), backend, output_attentions)
    u_mean, y_mean, attention, x0 = out[:4]
    with torch.autocast(u_mean.device.type, enabled=False):
        product = F.linear(u_mean.to(ff_out_weight.dtype), ff_out_weight)
    return product, y_mean, attention if output_attentions else None, x0 if rows is not None else None


def pool(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, ff_out_weight: Tensor,
    ff_out_bias: Tensor, heads: int, plan: Plan, backend: str = "auto", output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The mean over latents p [B, D] = W2 ū + b2 + ȳ, float32 or wider; A and X0 as `cross_attend` gives them."""
    product, y_mean, attention, x0 = cross_attend(
        states, rows, key_mask, w, ff_out_weight, heads, plan, backend, output_attentions
    )
    return embed(product, ff_out_bias, y_mean, None, None, False, y_mean.dtype, backend), attention, x0
