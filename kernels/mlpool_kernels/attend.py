"""Attend: the latents' attention over the n keys (layers or tokens) of each text.

    X, m of X0 (rows.py)        S = X Q̃ᵀ        A = softmax_n(S)

X0 [B,n,D] -> X [B,n,D] and A [B,n,H·R]. Queries come in one of two exact forms (`plan.py` picks the cheaper):

    absorbed   Q̃ [H·R, D] = Q_h Wk_h / √d, once per weight update; S needs X only
    plain      Q [H, R, d] / √d and Wk [I, D]; K = X Wkᵀ, S_h = K_h Q_hᵀ

Where H·R is small, gather, one length, mix, layer weights, norm, scores and softmax are one launch: a program holds the
L rows of one text and all columns of its scores (few texts are spread over blocks of columns), reads the rows from
memory once, for their lengths, and again from cache for mean and variance and for the products, and the whole softmax
fits in its tile. Where H·R is large the rows are a launch, the scores a plain matrix product, and the softmax, streamed
over the keys with the padding mask, another launch. The backward is matrix products around one such launch.

Source: arXiv 2409.02727, section 3.3, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import NORM_EPS, Norm, _begin, _factor, _inverse_deviation, _scale, _shift, place
from .runtime import capability, ceil_div, dot_options, jit, power_of_2, product_by_head, tl
from .tiles import tile

# So many programs fill a large GPU (132 multiprocessors).
MANY_TEXTS = 128
# Of a text's rows held at a time where only sums are taken of them: no scores wait in registers then.
SUM_NUMBERS = 1 << 13


@jit
def _attend_kernel(
    states, rows, mix_weights, layer_weights, norm_weight, norm_bias, queries, x0, keys, attention, mixed,
    tokens, stride_text, stride_token, columns, eps,
    LAYERS: tl.constexpr, NUM_KEYS: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A text's rows against a block of columns. BLOCK_S: columns of D at a time where sums alone are taken."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    layer = tl.arange(0, BLOCK_L)
    valid = layer < NUM_KEYS
    base = _begin(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS)

    factor = tl.full([BLOCK_L], 1.0, tl.float32)
    share = tl.zeros([BLOCK_L], tl.float32)
    if mix_weights is not None:
        square = tl.zeros([BLOCK_L], tl.float32)
        for first in range(0, HIDDEN, BLOCK_S):
            column = first + tl.arange(0, BLOCK_S)
            mask = valid[:, None] & (column < HIDDEN)[None, :]
            x = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1)
        factor = _factor(square, HIDDEN)
        share = tl.load(mix_weights + layer, mask=valid, other=0.0).to(tl.float32)

    # Mean and variance, block by block (Chan's update): no cancellation where the mean is large.
    mean = tl.zeros([BLOCK_L], tl.float32)
    spread = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, HIDDEN, BLOCK_S):
        column = first + tl.arange(0, BLOCK_S)
        inside = column < HIDDEN
        mask = valid[:, None] & inside[None, :]
        x = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32) * factor[:, None]
        x = _shift(x, column, layer_weights, layer, mask, HIDDEN)
        width = tl.minimum(HIDDEN - first, BLOCK_S).to(tl.float32)
        block_mean = tl.sum(x, 1) / width
        centred = tl.where(inside[None, :], x - block_mean[:, None], 0.0)
        delta = block_mean - mean
        mean += delta * width / (first + width)
        spread += tl.sum(centred * centred, 1) + delta * delta * (first * width / (first + width))
    rstd = _inverse_deviation(spread / HIDDEN, eps)

    # Every block of columns needs X; the first one writes it.
    writer = valid & (block == 0)
    query = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = tl.zeros([BLOCK_L, BLOCK_N], tl.float32)
    out = (text * NUM_KEYS + layer.to(tl.int64))[:, None] * HIDDEN
    for first in range(0, HIDDEN, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < HIDDEN
        mask = valid[:, None] & inside[None, :]
        raw = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
        if rows is not None:
            tl.store(x0 + out + column[None, :], raw, mask=writer[:, None] & inside[None, :])
        x = raw.to(tl.float32) * factor[:, None]
        if mix_weights is not None:
            tl.store(mixed + text * HIDDEN + column, tl.sum(x * share[:, None], 0), mask=inside & (block == 0))
        x = _shift(x, column, layer_weights, layer, mask, HIDDEN)
        x = _scale(x, mean, rstd, column, norm_weight, norm_bias, HIDDEN).to(keys.dtype.element_ty)
        tl.store(keys + out + column[None, :], x, mask=writer[:, None] & inside[None, :])
        q = tl.load(
            queries + query[None, :].to(tl.int64) * HIDDEN + column[:, None],
            mask=(query < columns)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            x, q = x.to(tl.float32), q.to(tl.float32)
        scores = tl.dot(x, q, scores, input_precision=PRECISION)
    scores = tl.where(valid[:, None], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    target = attention + (text * NUM_KEYS + layer.to(tl.int64))[:, None] * columns + query[None, :]
    tl.store(target, weights.to(attention.dtype.element_ty), mask=valid[:, None] & (query < columns)[None, :])


@jit
def _load_scores(scores, base, key, column, key_mask, text, keys, columns, MASKED: tl.constexpr):
    valid = key < keys
    if MASKED:
        valid = valid & (tl.load(key_mask + text * keys + key, mask=valid, other=0) != 0)
    offset = base + key.to(tl.int64)[:, None] * columns + column[None, :]
    mask = valid[:, None] & (column < columns)[None, :]
    return tl.load(scores + offset, mask=mask, other=float("-inf")).to(tl.float32), offset


@jit
def _softmax_kernel(
    scores, key_mask, keys, columns, MASKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """In place; one pass keeps the running maximum and sum, a second one writes."""
    text = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = text * keys * columns
    peak = tl.full([BLOCK_N], -1e38, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        s, _ = _load_scores(scores, base, key, column, key_mask, text, keys, columns, MASKED)
        higher = tl.maximum(peak, tl.max(s, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[None, :]), 0)
        peak = higher
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        s, offset = _load_scores(scores, base, key, column, key_mask, text, keys, columns, MASKED)
        weight = tl.exp(s - peak[None, :]) / total[None, :]
        inside = (key < keys)[:, None] & (column < columns)[None, :]
        tl.store(scores + offset, weight.to(scores.dtype.element_ty), mask=inside)


@jit
def _softmax_backward_kernel(
    attention, grad, keys, columns, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dS = A ⊙ (dA − Σ_n A ⊙ dA), in place of dA. Masked keys have A = 0 and so dS = 0."""
    text = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = text * keys * columns
    inner = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        offset = base + key.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (key < keys)[:, None] & (column < columns)[None, :]
        a = tl.load(attention + offset, mask=inside, other=0.0).to(tl.float32)
        inner += tl.sum(a * tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32), 0)
    for first in range(0, keys, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        offset = base + key.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (key < keys)[:, None] & (column < columns)[None, :]
        a = tl.load(attention + offset, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + offset, (a * (d - inner[None, :])).to(grad.dtype.element_ty), mask=inside)


def attend_one_launch(
    states: Sequence[Tensor], rows: Tensor | None, norm: Norm, queries: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Triton: gather (with `rows`), one length and mix, layer weights, norm, scores and softmax, in one launch.

    Args:
        states, rows: see `rows.place`. queries: Q̃ [H·R, D] of `dtype`, which is that of X, A and the operands.

    Returns: X0 [B,n,D] (the given one where nothing was gathered), X [B,n,D], m [B,D] of a mix, A [B,n,H·R].
    """
    states, x0, where = place(states, rows)
    (batch, num_keys, hidden), columns = x0.shape, queries.shape[0]
    keys, attention = (x0.new_empty(batch, num_keys, width, dtype=dtype) for width in (hidden, columns))
    mixed = None if norm.mix is None else x0.new_empty(batch, hidden, dtype=torch.float32)
    t, block_l = _attend_tile(batch, num_keys, columns, hidden, dtype, capability(x0))
    blocks, block_s = ceil_div(columns, t["BLOCK_N"]), min(power_of_2(hidden, 16), max(16, SUM_NUMBERS // block_l))
    with torch.cuda.device_of(x0):
        _attend_kernel[(batch * blocks,)](
            tuple(states), rows, *norm, queries, x0, keys, attention, mixed, *where, columns, NORM_EPS, len(states),
            num_keys, hidden, blocks, block_l, block_s, **t, **dot_options(dtype),
        )  # fmt: skip
    return x0, keys, mixed, attention


def one_launch(batch: int, keys: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether gather to softmax may be one launch that reads every row from memory at most twice.

    Many texts: where one program holds all H·R columns of its text. Few texts are spread over blocks of columns, for
    which their rows are read again, from the cache.
    """
    return batch < MANY_TEXTS or _holds(keys, columns, dtype)


def _holds(keys: int, columns: int, dtype: torch.dtype) -> bool:
    scores = power_of_2(keys, 16) * power_of_2(columns, 16)
    return dtype != torch.float32 and scores <= tile("attend_text")["NUMBERS"]


def _attend_tile(
    batch: int, keys: int, columns: int, hidden: int, dtype: torch.dtype, gpu: int | None
) -> tuple[dict[str, int], int]:
    """The tile, and how many keys it has."""
    block_l = power_of_2(keys, 16)
    if batch < MANY_TEXTS or not _holds(keys, columns, dtype):
        return tile("attend", hidden, wide=dtype == torch.float32, capability=gpu), block_l
    t = tile("attend_text", hidden)
    del t["NUMBERS"]
    block_n = power_of_2(columns, 16)
    # Eight warps are for hundreds of columns of scores; for a hundred four do, with which sm_100 does not spill.
    warps = t["num_warps"] if block_n > 128 else min(4, t["num_warps"])
    return t | {"BLOCK_N": block_n, "num_warps": warps}, block_l


def scores(keys: Tensor, queries: Tensor, key_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """S [B, n, H·R], and K [B·n, H, d] where the keys are not absorbed. Plain matrix products.

    Args:
        keys: X [B, n, D]. queries: Q̃ [H·R, D] without `key_weight`, Q [H, R, d] with Wk [I, D].
    """
    batch, num_keys, _ = keys.shape
    if key_weight is None:
        return keys @ queries.T, None
    k = (keys.flatten(0, 1) @ key_weight.T).unflatten(1, (queries.shape[0], -1))
    return product_by_head(k, queries.transpose(1, 2)).view(batch, num_keys, -1), k


def softmax_(s: Tensor, key_mask: Tensor | None, triton: bool) -> Tensor:
    """A = softmax over the n keys of S [B, n, H·R]; may overwrite S. key_mask: bool [B, n], False is padding."""
    if not triton:
        if key_mask is not None:
            s = s.masked_fill_(~key_mask[:, :, None], float("-inf"))
        return s.softmax(1)
    s = s.contiguous()
    batch, keys, columns = s.shape
    t = tile("softmax")
    with torch.cuda.device_of(s):
        grid = (batch, ceil_div(columns, t["BLOCK_N"]))
        _softmax_kernel[grid](s, key_mask, keys, columns, key_mask is not None, **t)
    return s


def softmax_backward_(attention: Tensor, grad: Tensor, triton: bool) -> Tensor:
    """dS [B, n, H·R] from A and dA; may overwrite dA."""
    if not triton:
        return torch._softmax_backward_data(grad, attention, 1, attention.dtype)
    grad = grad.contiguous()  # a batched product gives what it likes where a size is 1
    batch, keys, columns = attention.shape
    t = tile("softmax")
    with torch.cuda.device_of(attention):
        grid = (batch, ceil_div(columns, t["BLOCK_N"]))
        _softmax_backward_kernel[grid](attention, grad, keys, columns, **t)
    return grad


def scores_backward(
    grad: Tensor, keys: Tensor, queries: Tensor, key_weight: Tensor | None, k: Tensor | None, added: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dS [B,n,H·R] -> dX [B·n, D] on top of `added`, dQ̃ or dQ, dWk."""
    x = keys.flatten(0, 1)
    grad = grad.flatten(0, 1)
    if key_weight is None:
        return torch.addmm(added, grad, queries), grad.T @ x, None
    assert k is not None
    heads, latents, _ = queries.shape
    by_head = grad.view(-1, heads, latents)
    dk = product_by_head(by_head, queries).flatten(1)
    dqueries = torch.bmm(by_head.permute(1, 2, 0), k.transpose(0, 1))
    return torch.addmm(added, dk, key_weight), dqueries, dk.T @ x
