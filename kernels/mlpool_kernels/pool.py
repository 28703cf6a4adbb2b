"""The whole pool: hidden states or gathered rows -> one vector per text, forward and backward.

    X0 -> X, A        attend.py       gather, layer weights, norm, scores, softmax
    A, X -> N, ȳ      mix.py          values, mixing, residual latents, norm, mean over latents
    N -> ū            feed_forward.py W1, gate, mean over latents
    W2 ū, ȳ -> p      embed.py        the mean over latents commutes with W2 and the residual: p = W2 ū + b2 + ȳ

p [B,D] equals the mean over latents of the reference's Y' (`reference.py`). What depends on the weights alone, the
queries Q or Q̃ and the absorbed values, is computed outside (`fold_queries`, `fold_values`), once per weight update.
`plan.py` picks among the exact forms. Texts are taken in chunks, so that what lies between X0 and ū never exists for
the whole batch unless the backward is to keep it.

The op is registered with torch (`mlpool::pool`), so torch.compile sees one node. Where nothing traces it is called
directly, with gradients as an autograd function: a registered op costs more than a small pool's launches.

Source: arXiv 2409.02727, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attend, feed_forward, mix
from .attend import NORM_EPS
from .embed import embed
from .gather import _backward as gather_backward
from .gather import _gather_backward_op
from .plan import Plan, Sizes
from .runtime import direct, untraced, use_triton

# Intermediates alive at once where nothing is kept for the backward.
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 768 << 20}


class Weights(NamedTuple):
    """What the op reads. Matrices are of the compute dtype, vectors and latents of any floating dtype.

    layer_weights [n,D] or None; key_norm_* [D]; queries Q̃ [H·R,D], or Q [H,R,d] with key_weight [I,D], or None where
    there is one key; value_weight [I,D] with output_weight [D,I], or the absorbed [H·D,D] without; latents [R,D];
    ff_norm_* [D]; ff_in_weight [2F,D]; ff_in_bias [2F].
    """

    layer_weights: Tensor | None
    key_norm_weight: Tensor
    key_norm_bias: Tensor
    queries: Tensor | None
    key_weight: Tensor | None
    value_weight: Tensor
    output_weight: Tensor | None
    latents: Tensor
    ff_norm_weight: Tensor
    ff_norm_bias: Tensor
    ff_in_weight: Tensor
    ff_in_bias: Tensor


class Saved(NamedTuple):
    """What the forward keeps for the backward; `mixed` is what `mix.values` gave."""

    keys: Tensor
    attention: Tensor
    k: Tensor | None
    mixed: list[Tensor]
    y: Tensor | None
    both: Tensor | None


def fold_queries(
    latents: Tensor, norm_weight: Tensor, norm_bias: Tensor, query_weight: Tensor, key_weight: Tensor | None, heads: int
) -> Tensor:
    """The text-independent half of the scores, scaled by 1/√d.

    Args:
        latents: Z [R,D]. norm_*: LN2. query_weight: Wq [I,D]. key_weight: Wk [I,D] to absorb it, or None.

    Returns: Q̃ [H·R, D] with `key_weight`, Q [H, R, d] without; of query_weight's dtype. Differentiable.
    """
    dtype, hidden = query_weight.dtype, latents.shape[-1]
    # On a GPU and of one dtype the norm's own float32 inside is as good, and spares a small pool's training the casts.
    one = latents.is_cuda and latents.dtype == norm_weight.dtype == norm_bias.dtype == dtype
    wide = dtype if one else torch.promote_types(latents.dtype, torch.float32)
    z = F.layer_norm(latents.to(wide), (hidden,), norm_weight.to(wide), norm_bias.to(wide), NORM_EPS)
    q = (z.to(dtype) @ query_weight.T).unflatten(1, (heads, -1)).transpose(0, 1)
    q = q * q.shape[-1] ** -0.5
    if key_weight is None:
        return q.contiguous()
    return torch.bmm(q, key_weight.unflatten(0, (heads, -1))).flatten(0, 1)


def fold_values(value_weight: Tensor, output_weight: Tensor, heads: int) -> Tensor:
    """Wo_h Wv_h for every head: Wv [I,D], Wo [D,I] -> [H·D, D]. Differentiable."""
    by_head = output_weight.unflatten(1, (heads, -1)).transpose(0, 1)
    return torch.bmm(by_head, value_weight.unflatten(0, (heads, -1))).flatten(0, 1)


def _batch_and_keys(states: Sequence[Tensor], rows: Tensor | None) -> tuple[int, int]:
    return (len(rows), len(states)) if rows is not None else (states[0].shape[0], states[0].shape[1])


def sizes(states: Sequence[Tensor], rows: Tensor | None, w: Weights, heads: int) -> Sizes:
    batch, keys = _batch_and_keys(states, rows)
    num_latents, hidden = w.latents.shape
    head_dim = w.value_weight.shape[0] // heads
    return Sizes(batch, keys, hidden, num_latents, heads, head_dim, w.ff_in_weight.shape[0] // 2)


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


def _attention(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """X0, X, A and, where keys are plain, K, of a chunk of texts."""
    dtype = w.ff_in_weight.dtype
    norm = (w.layer_weights, w.key_norm_weight, w.key_norm_bias)
    one = triton and plan.launches == "one" and w.queries is not None and w.key_weight is None and key_mask is None
    if one and attend.one_launch(*_batch_and_keys(states, rows), heads * len(w.latents), dtype):
        x0, keys, attention = attend.attend_one_launch(states, rows, *norm, w.queries, dtype)
        assert attention is not None
        return x0, keys, attention, None
    if triton:
        x0, keys, _ = attend.attend_one_launch(states, rows, *norm, None, dtype)
    else:
        x0, keys = states[0], attend.norm_keys(states[0], *norm, dtype)
    if w.queries is None:
        # One key: the softmax over a single entry is 1 whatever the query.
        return x0, keys, keys.new_ones(*keys.shape[:2], heads * len(w.latents)), None
    s, k = attend.scores(keys, w.queries, w.key_weight)
    return x0, keys, attend.softmax_(s, key_mask, triton), k


def _forward_chunk(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved]:  # fmt: skip
    """ū, ȳ, X0 and what the backward needs."""
    x0, keys, attention, k = _attention(states, rows, key_mask, w, heads, plan, triton)
    mixed = mix.values(keys, w.value_weight, w.output_weight, heads, plan.values)
    keep = plan.memory != "recompute"
    kernel = triton and plan.mix == "kernel"
    normed, y_mean, y = mix.mix(
        attention, mixed, w.output_weight, w.latents, w.ff_norm_weight, w.ff_norm_bias, plan.values, kernel, keep
    )
    save = plan.memory == "save"
    u_mean, both = feed_forward.feed_forward(normed, w.ff_in_weight, w.ff_in_bias, plan.feed_forward, triton, save)
    return u_mean, y_mean, x0, Saved(keys, attention, k, mixed, y, both)


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
            u, y_mean, x0, saved = _forward_chunk(*_select_texts(states, rows, key_mask, part), w, heads, plan, triton)
            # An op's outputs must not share memory: every absent one is an empty tensor of its own.
            attention = saved.attention if keep or output_attentions else u.new_empty(0)
            parts.append((u, y_mean, attention, x0 if rows is not None else u.new_empty(0)))
        joined = [p[0] if len(p) == 1 else torch.cat(p) for p in zip(*parts, strict=True)]
    if keep:
        joined += [t for t in (saved.keys, saved.k, *saved.mixed, saved.y, saved.both) if t is not None]
    return joined


def _unpack(kept: Sequence[Tensor], attention: Tensor, w: Weights, plan: Plan) -> Saved:
    """The inverse of what `_forward` appended."""
    rest = list(kept)
    keys = rest.pop(0)
    k = rest.pop(0) if w.queries is not None and w.key_weight is not None else None
    mixed = [rest.pop(0) for _ in range(2 if plan.values == "early" else 1)]
    y = rest.pop(0)
    return Saved(keys, attention, k, mixed, y, rest.pop(0) if rest else None)


def _backward_chunk(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, w: Weights, heads: int, plan: Plan,
    saved: Saved, triton: bool,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """dX0 of a chunk and the gradients of the weights, named as in `Weights`."""
    g: dict[str, Tensor | None] = {}
    y = saved.y
    if y is None:
        y = mix.mixed_latents(saved.attention, saved.mixed, w.output_weight, w.latents, plan.values)
    normed, mean, rstd = mix.norm_latents(y, w.ff_norm_weight, w.ff_norm_bias)
    dnormed, g["ff_in_weight"], g["ff_in_bias"] = feed_forward.feed_forward_backward(
        du, normed, w.ff_in_weight, w.ff_in_bias, saved.both, triton
    )
    dy, g["ff_norm_weight"], g["ff_norm_bias"] = mix.norm_latents_backward(
        dnormed, y, mean, rstd, w.ff_norm_weight, w.ff_norm_bias
    )
    dy = dy.add_(dy_mean[:, None], alpha=1 / y.shape[1])
    g["latents"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))

    da, dmixed, g["output_weight"] = mix.mix_backward(dy, saved.attention, saved.mixed, w.output_weight, plan.values)
    dx, g["value_weight"], dwo = mix.values_backward(
        dmixed, saved.keys, saved.mixed, w.value_weight, w.output_weight, plan.values
    )
    g["output_weight"] = dwo if dwo is not None else g["output_weight"]
    if w.queries is not None:
        if dattention is not None:
            da = da + dattention
        ds = attend.softmax_backward_(saved.attention, da, triton)
        dx, g["queries"], g["key_weight"] = attend.scores_backward(ds, saved.keys, w.queries, w.key_weight, saved.k, dx)
    dx0, g["layer_weights"], g["key_norm_weight"], g["key_norm_bias"] = attend.norm_keys_backward(
        dx.view_as(saved.keys), x0, w.layer_weights, w.key_norm_weight, w.key_norm_bias
    )
    return dx0, {name: grad for name, grad in g.items() if grad is not None}


def _backward(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, key_mask: Tensor | None, w: Weights,
    heads: int, plan: Plan, backend: str, attention: Tensor, kept: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """[dX0, the gradient of every weight in the order of `Weights`]; empty for a weight that is absent."""
    triton = use_triton(backend, x0, *w)
    dx0: list[Tensor] = []
    total: dict[str, Tensor] = {}
    with torch.autocast(x0.device.type, enabled=False):
        for part in _chunks(sizes([x0], None, w, heads), w, plan):
            if plan.memory == "recompute":
                chunk = _select_texts([x0], None, key_mask, part)
                *_, k = computed = _attention(*chunk, w, heads, plan, triton)
                mixed = mix.values(computed[1], w.value_weight, w.output_weight, heads, plan.values)
                saved = Saved(computed[1], computed[2], k, mixed, None, None)
            else:
                saved = _unpack(kept, attention, w, plan)
            da = None if dattention is None else dattention[part]
            dx, grads = _backward_chunk(du[part], dy_mean[part], da, x0[part], w, heads, plan, saved, triton)
            dx0.append(dx)
            for name, grad in grads.items():
                total[name] = grad if name not in total else total[name].add_(grad)
    out = [dx0[0] if len(dx0) == 1 else torch.cat(dx0)]
    for name, weight in w._asdict().items():
        if weight is None:
            out.append(x0.new_empty(0))
        else:
            out.append(total[name].to(weight.dtype) if name in total else torch.zeros_like(weight))
    return out


@torch.library.custom_op("mlpool::pool", mutates_args=())
def _pool_op(
    states: list[Tensor], rows: Tensor | None, key_mask: Tensor | None,
    layer_weights: Tensor | None, key_norm_weight: Tensor, key_norm_bias: Tensor, queries: Tensor | None,
    key_weight: Tensor | None, value_weight: Tensor, output_weight: Tensor | None, latents: Tensor,
    ff_norm_weight: Tensor, ff_norm_bias: Tensor, ff_in_weight: Tensor, ff_in_bias: Tensor,
    heads: int, plan: str, backend: str, output_attentions: bool,
) -> list[Tensor]:  # fmt: skip
    w = Weights(
        layer_weights, key_norm_weight, key_norm_bias, queries, key_weight, value_weight, output_weight, latents,
        ff_norm_weight, ff_norm_bias, ff_in_weight, ff_in_bias,
    )  # fmt: skip
    return _forward(states, rows, key_mask, w, heads, Plan.parse(plan), backend, output_attentions)


@_pool_op.register_fake
def _(states, rows, key_mask, *rest):
    w, (heads, text, _, output_attentions) = Weights(*rest[:12]), rest[12:]
    plan, first = Plan.parse(text), states[0]
    s = sizes(states, rows, w, heads)
    dtype = w.ff_in_weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    keep = plan.memory != "recompute"
    columns = s.heads * s.latents

    def like(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return first.new_empty(shape, dtype=dtype)

    out = [like(s.batch, s.width, dtype=wide), like(s.batch, s.hidden, dtype=wide)]
    out.append(like(s.batch, s.keys, columns) if keep or output_attentions else like(0, dtype=wide))
    out.append(like(s.batch, s.keys, s.hidden, dtype=first.dtype) if rows is not None else like(0, dtype=wide))
    if not keep:
        return out
    n = s.batch * s.keys
    out.append(like(s.batch, s.keys, s.hidden))
    if w.queries is not None and w.key_weight is not None:
        out.append(like(n, s.heads, w.key_weight.shape[0] // heads))
    if plan.values != "late":
        out.append(like(n, s.heads, s.hidden))
    if plan.values != "absorbed":
        out.append(like(n, s.heads, s.head_dim))
    out.append(like(s.batch, s.latents, s.hidden))
    if plan.memory == "save":
        out.append(like(s.batch, s.latents, 2 * s.width))
    return out


@torch.library.custom_op("mlpool::pool_backward", mutates_args=())
def _pool_backward_op(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, key_mask: Tensor | None,
    layer_weights: Tensor | None, key_norm_weight: Tensor, key_norm_bias: Tensor, queries: Tensor | None,
    key_weight: Tensor | None, value_weight: Tensor, output_weight: Tensor | None, latents: Tensor,
    ff_norm_weight: Tensor, ff_norm_bias: Tensor, ff_in_weight: Tensor, ff_in_bias: Tensor,
    heads: int, plan: str, backend: str, attention: Tensor, kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    w = Weights(
        layer_weights, key_norm_weight, key_norm_bias, queries, key_weight, value_weight, output_weight, latents,
        ff_norm_weight, ff_norm_bias, ff_in_weight, ff_in_bias,
    )  # fmt: skip
    return _backward(du, dy_mean, dattention, x0, key_mask, w, heads, Plan.parse(plan), backend, attention, kept)


@_pool_backward_op.register_fake
def _(du, dy_mean, dattention, x0, key_mask, *rest):
    weights = [x0.new_empty(0) if t is None else torch.empty_like(t) for t in rest[:12]]
    return [torch.empty_like(x0), *weights]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    states, rows, key_mask = inputs[:3]
    weights = inputs[3:15]
    ctx.heads, ctx.plan, ctx.backend, ctx.output_attentions = inputs[15:]
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
    w, attention, kept = Weights(*rest[:12]), rest[12], rest[13:]
    du, dy_mean, dattention, dx0_direct = grads[:4]
    batch = x0.shape[0]
    wide = torch.promote_types(w.ff_in_weight.dtype, torch.float32)
    if du is None:
        du = x0.new_zeros(batch, w.ff_in_weight.shape[0] // 2, dtype=wide)
    if dy_mean is None:
        dy_mean = x0.new_zeros(batch, x0.shape[-1], dtype=wide)
    if not ctx.output_attentions:
        dattention = None
    given, plain = (du.contiguous(), dy_mean, dattention, x0, key_mask), untraced((du, x0, *w))
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

    Returns: W2 ū [B, D] of W2's dtype; ȳ [B, D], float32 or wider; A [B, n, H·R] of the compute dtype where
    `output_attentions`; X0 where `rows` were gathered. Differentiable in states and every weight.
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
