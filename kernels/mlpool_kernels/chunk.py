"""Chunk: some texts through the pooler's steps, forward and backward, on what `pool.py` hands over.

    X0 -> X, m, A     attend.py       gather, rows (rows.py: one length, mix of layers, norm), scores, softmax
    A, X, m -> N, ȳ   mix.py          values, mixing, residual latents, norm, mean over latents
    N -> ū            feed_forward.py W1, gate, mean over latents

and back. Each step's gradient is a function of its file; what they all share is written here: the weights, what is
kept, and the order. By Triton the sums over texts are taken last, all in one launch (sums.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import attend, feed_forward, mix
from .mix import Values
from .plan import Plan, Sizes, by_heads
from .rows import Norm, norm_rows, norm_rows_backward, norm_rows_backward_triton, norm_rows_triton
from .runtime import wide_dtype
from .sums import sum_parts


class Weights(NamedTuple):
    """What the op reads. Matrices are of the compute dtype, vectors and latents of any floating dtype.

    layer_weights [n,D] or None; key_norm_* [D]; queries Q̃ [H·R,D], or Q [H,R,d] with key_weight [I,D], or None where
    there is one key; value_weight [I,D] with output_weight [D,I], or the absorbed [H·D,D] without; latents [R,D];
    ff_norm_* [D]; ff_in_weight [2F,D]; ff_in_bias [2F]; mix_weights [n], with which every row of X0 is brought to
    length √D and their mix is what the pooler stands on, or None.
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
    mix_weights: Tensor | None = None

    @property
    def of_keys(self) -> Norm:
        return Norm(self.mix_weights, self.layer_weights, self.key_norm_weight, self.key_norm_bias)

    @property
    def of_latents(self) -> Norm:
        return Norm(None, None, self.ff_norm_weight, self.ff_norm_bias)


NUM_WEIGHTS = len(Weights._fields)


class Saved(NamedTuple):
    """What the forward keeps for the backward: X, A, K, the values, Y, N and [a|g]."""

    keys: Tensor
    attention: Tensor
    k: Tensor | None
    values: Values
    y: Tensor | None = None
    normed: Tensor | None = None
    both: Tensor | None = None


def _batch_and_keys(states: Sequence[Tensor], rows: Tensor | None) -> tuple[int, int]:
    return (len(rows), len(states)) if rows is not None else (states[0].shape[0], states[0].shape[1])


def sizes(states: Sequence[Tensor], rows: Tensor | None, w: Weights, heads: int) -> Sizes:
    batch, keys = _batch_and_keys(states, rows)
    num_latents, hidden = w.latents.shape
    head_dim = w.value_weight.shape[0] // heads
    return Sizes(batch, keys, hidden, num_latents, heads, head_dim, w.ff_in_weight.shape[0] // 2)


def _attention(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """X0, X, m, A and, where keys are plain, K, of a chunk of texts."""
    dtype, columns = w.ff_in_weight.dtype, heads * len(w.latents)
    one = triton and plan.launches == "one" and w.queries is not None and w.key_weight is None and key_mask is None
    if one and attend.one_launch(*_batch_and_keys(states, rows), columns, dtype):
        assert w.queries is not None
        return *attend.attend_one_launch(states, rows, w.of_keys, w.queries, dtype), None
    if triton:
        x0, keys, mixed = norm_rows_triton(states, rows, w.of_keys, dtype)
    else:
        x0, (keys, mixed) = states[0], norm_rows(states[0], w.of_keys, dtype)
    if w.queries is None:
        # One key: the softmax over a single entry is 1 whatever the query.
        return x0, keys, mixed, keys.new_ones(*keys.shape[:2], columns), None
    s, k = attend.scores(keys, w.queries, w.key_weight)
    return x0, keys, mixed, attend.softmax_(s, key_mask, triton), k


def forward_chunk(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved]:  # fmt: skip
    """ū, ȳ, X0 and what the backward needs."""
    x0, mixed, saved = _attended(states, rows, key_mask, w, heads, plan, triton)
    kernel, save = triton and plan.mix == "kernel", plan.memory == "save"
    normed, y_mean, y = mix.mix(
        saved.attention, saved.values, w.output_weight, w.latents, w.ff_norm_weight, w.ff_norm_bias, mixed,
        plan.values, kernel,
    )  # fmt: skip
    u_mean, both = feed_forward.feed_forward(normed, w.ff_in_weight, w.ff_in_bias, plan.feed_forward, triton, save)
    return u_mean, y_mean, x0, saved._replace(y=y, normed=normed if save and kernel else None, both=both)


def _attended(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
    """X0, m, and what the steps up to the values leave."""
    x0, keys, mixed, attention, k = _attention(states, rows, key_mask, w, heads, plan, triton)
    in_kernel = triton and by_heads(sizes([x0], None, w, heads), plan)
    values = mix.values(keys, w.value_weight, w.output_weight, heads, plan.values, in_kernel)
    return x0, mixed, Saved(keys, attention, k, values)


def again(
    states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, w: Weights, heads: int, plan: Plan,
    triton: bool,
) -> Saved:  # fmt: skip
    """For a backward that kept X0 alone: what comes before Y, computed again."""
    return _attended(states, rows, key_mask, w, heads, plan, triton)[2]


def pack(saved: Saved) -> list[Tensor]:
    """All but A, which an op gives in a place of its own, without what is absent."""
    kept = (saved.keys, saved.k, *saved.values, saved.y, saved.normed, saved.both)
    return [t for t in kept if t is not None]


def unpack(kept: Sequence[Tensor], attention: Tensor, w: Weights, s: Sizes, plan: Plan, triton: bool) -> Saved:
    """The inverse of `pack`."""
    rest = iter(kept)
    keys = next(rest)
    k = next(rest) if w.queries is not None and w.key_weight is not None else None
    v = next(rest) if plan.values != "absorbed" else None
    vo = next(rest) if plan.values != "late" and not (triton and by_heads(s, plan)) else None
    y, saves_norm = next(rest), triton and plan.mix == "kernel" and plan.memory == "save"
    return Saved(keys, attention, k, Values(v, vo), y, next(rest) if saves_norm else None, next(rest, None))


Gradients = dict[str, Tensor | None]


def _latents_backward(
    du: Tensor, dy_mean: Tensor, w: Weights, plan: Plan, saved: Saved, g: Gradients, parts: dict[str, Tensor]
) -> Tensor:
    """Triton: dY of a chunk; the gradients on the way go to g, those left in parts to `parts`."""
    y, normed = saved.y, saved.normed
    if y is None:
        normed, _, y = mix.mix(
            saved.attention, saved.values, w.output_weight, w.latents, w.ff_norm_weight, w.ff_norm_bias, None,
            plan.values, plan.mix == "kernel",
        )  # fmt: skip
    elif normed is None:
        _, normed, _ = norm_rows_triton([y], None, w.of_latents, y.dtype)
    assert normed is not None
    dnormed, g["ff_in_weight"], parts["ff_in_bias"] = feed_forward.feed_forward_backward(
        du, normed, w.ff_in_weight, w.ff_in_bias, saved.both, True
    )
    dy, of_norm = norm_rows_backward_triton(
        dnormed, y, w.of_latents, dy_mean, summed=True, shared=w.mix_weights is None
    )
    assert of_norm.layers is not None
    parts |= {"latents": of_norm.layers, "ff_norm_weight": of_norm.weight, "ff_norm_bias": of_norm.bias}
    return dy


def _latents_backward_torch(
    du: Tensor, dy_mean: Tensor, w: Weights, plan: Plan, saved: Saved, g: Gradients
) -> Tensor:  # fmt: skip
    y = saved.y
    if y is None:
        y = mix.mixed_latents(saved.attention, saved.values, w.output_weight, w.latents, plan.values)
    normed, mean, rstd = mix.norm_latents(y, w.ff_norm_weight, w.ff_norm_bias)
    dnormed, g["ff_in_weight"], parts = feed_forward.feed_forward_backward(
        du, normed, w.ff_in_weight, w.ff_in_bias, saved.both, False
    )
    g["ff_in_bias"] = parts[0] if len(parts) == 1 else parts.sum(0)
    dy, g["ff_norm_weight"], g["ff_norm_bias"] = mix.norm_latents_backward(
        dnormed, y, mean, rstd, w.ff_norm_weight, w.ff_norm_bias
    )
    # With a mix ȳ is less the latents' own mean, and so their gradient has no part of dȳ.
    own = None if w.mix_weights is None else dy.sum(0, dtype=wide_dtype(dy))
    dy.add_(dy_mean[:, None], alpha=1 / y.shape[1])
    g["latents"] = dy.sum(0, dtype=wide_dtype(dy)) if own is None else own
    return dy


def _attention_backward(
    dy: Tensor, dattention: Tensor | None, w: Weights, plan: Plan, saved: Saved, g: Gradients, triton: bool
) -> Tensor:
    """dY -> dX [B·n, D] of a chunk."""
    a, values, scored = saved.attention, saved.values, w.queries is not None
    ds: Tensor | None
    if plan.values == "early" and values.vo is None:
        assert values.v is not None
        assert w.output_weight is not None
        rows = dy.flatten(0, 1)
        doutputs = (rows @ w.output_weight).view(*dy.shape[:2], -1)
        ds, dv, outputs = mix.mix_heads_backward(doutputs, a, values.v, dy.shape[1], dattention, scored)
        g["output_weight"] = rows.T @ outputs.flatten(0, 1)
        dx, g["value_weight"], _ = mix.values_backward(dv, saved.keys, values.v, w.value_weight, None, "late")
    else:
        da, dmixed, late = mix.mix_backward(dy, a, values, w.output_weight, plan.values)
        dx, g["value_weight"], early = mix.values_backward(
            dmixed, saved.keys, values.v, w.value_weight, w.output_weight, plan.values
        )
        g["output_weight"] = late if early is None else early
        if dattention is not None:
            da = da + dattention
        ds = attend.softmax_backward_(a, da, triton) if scored else None
    if ds is not None and w.queries is not None:
        dx, g["queries"], g["key_weight"] = attend.scores_backward(ds, saved.keys, w.queries, w.key_weight, saved.k, dx)
    return dx


def backward_chunk(
    du: Tensor, dy_mean: Tensor, dattention: Tensor | None, x0: Tensor, w: Weights, plan: Plan, saved: Saved,
    triton: bool, dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """dX0 of a chunk and the gradients of the weights, named as in `Weights`; dtype: of sums over texts by Triton."""
    g: Gradients = {}
    parts: dict[str, Tensor] = {}
    dmixed = None if w.mix_weights is None else dy_mean
    if triton:
        dy = _latents_backward(du, dy_mean, w, plan, saved, g, parts)
        dx = _attention_backward(dy, dattention, w, plan, saved, g, triton)
        summed = w.layer_weights is not None
        dx0, of_norm = norm_rows_backward_triton(dx.view_as(saved.keys), x0, w.of_keys, dmixed, summed=summed)
    else:
        dy = _latents_backward_torch(du, dy_mean, w, plan, saved, g)
        dx = _attention_backward(dy, dattention, w, plan, saved, g, triton)
        dx0, of_norm = norm_rows_backward(dx.view_as(saved.keys), x0, w.of_keys, dmixed)
    names = ("mix_weights", "layer_weights", "key_norm_weight", "key_norm_bias")
    of_rows = {name: grad for name, grad in zip(names, of_norm, strict=True) if grad is not None}
    if triton:
        g |= sum_parts(parts | of_rows, len(x0), dtype)
    else:
        g |= of_rows
    return dx0, {name: grad for name, grad in g.items() if grad is not None}
