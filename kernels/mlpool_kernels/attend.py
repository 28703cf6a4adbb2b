"""Attend: the latents' attention over the n keys (layers or tokens) of each text.

    H' = X0 + E        X = LN1(H')        S = X Q̃ᵀ        A = softmax_n(S)

X0 [B,n,D] -> X [B,n,D] and A [B,n,H·R]. Queries come in one of two exact forms (`plan.py` picks the cheaper):

    absorbed   Q̃ [H·R, D] = Q_h Wk_h / √d, once per weight update; S needs X only
    plain      Q [H, R, d] / √d and Wk [I, D]; K = X Wkᵀ, S_h = K_h Q_hᵀ

Where H·R is small, gather, layer weights, norm, scores and softmax are one launch: a program holds the L rows of one
text and all columns of its scores (few texts are spread over blocks of columns), reads the rows once for mean and
variance and once more for the products (the second reading comes from cache), and the whole softmax fits in its tile.
The norm alone reads whole rows, once. Where H·R is large the scores are a plain matrix product, and the softmax,
streamed over the keys with the padding mask, is its own launch. The backward is matrix products around one such
launch.

Source: arXiv 2409.02727, section 3.3, equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gather import _select, token_strides
from .runtime import ceil_div, dot_options, jit, power_of_2, product_by_head, tl
from .tiles import tile, whole_rows

NORM_EPS = 1e-5
# So many programs fill a large GPU (132 multiprocessors).
MANY_TEXTS = 128


@jit
def _rows(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS: tl.constexpr):
    """Where the rows of one text begin: layer by layer with `rows`, else row by row of X0."""
    layer = layer.to(tl.int64)
    if rows is None:
        base = states[0] + text * stride_text + layer * stride_token
    else:
        row = tl.load(rows + text)
        base = _select(states, layer, LAYERS) + (row // tokens) * stride_text + (row % tokens) * stride_token
    return base


@jit
def _shift(raw, column, layer_weights, layer, mask, HIDDEN: tl.constexpr):
    """A tile of H' = X0 + E in float32."""
    x = raw.to(tl.float32)
    if layer_weights is not None:
        x += tl.load(layer_weights + layer[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@jit
def _scale(x, mean, rstd, column, norm_weight, norm_bias, HIDDEN: tl.constexpr):
    inside = column < HIDDEN
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@jit
def _inverse_deviation(variance, eps):
    """NaN where the squares have left the range of float32: the rows would come out as zeros, and in silence."""
    return tl.where(variance < float("inf"), 1.0 / tl.sqrt(variance + eps), float("nan"))


@jit
def _norm_kernel(
    states, rows, layer_weights, norm_weight, norm_bias, x0, keys, tokens, stride_text, stride_token, eps,
    LAYERS: tl.constexpr, NUM_KEYS: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """X = LN1(X0 + E), and X0 where it is gathered; whole rows in registers, read once."""
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    layer = (tl.program_id(0) % BLOCKS) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    mask = (layer < NUM_KEYS)[:, None] & inside[None, :]
    base = _rows(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS)
    out = (text * NUM_KEYS + layer)[:, None] * HIDDEN + column[None, :]
    raw = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
    if rows is not None:
        tl.store(x0 + out, raw, mask=mask)
    x = _shift(raw, column, layer_weights, layer, mask, HIDDEN)
    mean = tl.sum(x, 1) / HIDDEN
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = _inverse_deviation(tl.sum(centred * centred, 1) / HIDDEN, eps)
    x = _scale(x, mean, rstd, column, norm_weight, norm_bias, HIDDEN)
    tl.store(keys + out, x.to(keys.dtype.element_ty), mask=mask)


@jit
def _attend_kernel(
    states, rows, layer_weights, norm_weight, norm_bias, queries, x0, keys, attention,
    tokens, stride_text, stride_token, columns, eps,
    LAYERS: tl.constexpr, NUM_KEYS: tl.constexpr, HIDDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    text = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    layer = tl.arange(0, BLOCK_L)
    valid = layer < NUM_KEYS
    base = _rows(states, rows, text, layer, tokens, stride_text, stride_token, LAYERS)

    # Mean and variance, block by block (Chan's update): no cancellation where the mean is large.
    mean = tl.zeros([BLOCK_L], tl.float32)
    spread = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, HIDDEN, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < HIDDEN
        mask = valid[:, None] & inside[None, :]
        raw = tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)
        x = _shift(raw, column, layer_weights, layer, mask, HIDDEN)
        width = tl.minimum(HIDDEN - first, BLOCK_D).to(tl.float32)
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
        x = _shift(raw, column, layer_weights, layer, mask, HIDDEN)
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
    states: Sequence[Tensor], rows: Tensor | None, layer_weights: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor, queries: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Triton: gather (with `rows`), layer weights, norm and, with absorbed `queries`, scores and softmax.

    Args:
        states: L tensors [B, T, D] with `rows` int64 [B] (flat row of each text), or one X0 [B, n, D] without.
        queries: Q̃ [H·R, D] of `dtype`, or None for X only.
        dtype: of X, A and the products' operands.

    Returns: X0 [B,n,D] (the given one where nothing was gathered), X [B,n,D], A [B,n,H·R] or None.
    """
    first, hidden = states[0], states[0].shape[-1]
    if rows is not None:
        batch, num_keys = len(rows), len(states)
        tokens, stride_text, stride_token = token_strides(first)
        x0 = first.new_empty(batch, num_keys, hidden)
    else:
        first = first if first.stride(-1) == 1 else first.contiguous()
        states, x0, (batch, num_keys) = [first], first, first.shape[:2]
        tokens, stride_text, stride_token = 1, first.stride(0), first.stride(1)
    keys = first.new_empty(batch, num_keys, hidden, dtype=dtype)
    place = (tokens, stride_text, stride_token)
    norm = (layer_weights, norm_weight, norm_bias)
    sizes = (len(states), num_keys, hidden)
    with torch.cuda.device_of(first):
        if queries is None:
            t, block_l, block_d = whole_rows("norm", hidden)
            blocks = ceil_div(num_keys, block_l)
            _norm_kernel[(batch * blocks,)](
                tuple(states), rows, *norm, x0, keys, *place, NORM_EPS, *sizes, blocks, block_l, block_d, **t
            )
            return x0, keys, None
        columns = queries.shape[0]
        attention = first.new_empty(batch, num_keys, columns, dtype=dtype)
        t, block_l = _attend_tile(batch, num_keys, columns, hidden, dtype)
        blocks = ceil_div(columns, t["BLOCK_N"])
        _attend_kernel[(batch * blocks,)](
            tuple(states), rows, *norm, queries, x0, keys, attention, *place, columns, NORM_EPS, *sizes, blocks,
            block_l, **t, **dot_options(dtype),
        )  # fmt: skip
    return x0, keys, attention


def one_launch(batch: int, keys: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether gather to softmax may be one launch that reads every row from memory at most twice.

    Many texts: where one program holds all H·R columns of its text. Few texts are spread over blocks of columns, for
    which their rows are read again, from the cache.
    """
    return batch < MANY_TEXTS or _holds(keys, columns, dtype)


def _holds(keys: int, columns: int, dtype: torch.dtype) -> bool:
    scores = power_of_2(keys, 16) * power_of_2(columns, 16)
    return dtype != torch.float32 and scores <= tile("attend_text")["NUMBERS"]


def _attend_tile(batch: int, keys: int, columns: int, hidden: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """The tile, and how many keys it has."""
    block_l = power_of_2(keys, 16)
    if batch < MANY_TEXTS or not _holds(keys, columns, dtype):
        return tile("attend", hidden, wide=dtype == torch.float32), block_l
    t = tile("attend_text", hidden)
    del t["NUMBERS"]
    return t | {"BLOCK_N": power_of_2(columns, 16)}, block_l


def norm_keys(x0: Tensor, layer_weights: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Torch: X = LN1(X0 + E) in float32 (or wider), rounded to `dtype`."""
    h = _shifted(x0, layer_weights)
    return torch.nn.functional.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), NORM_EPS).to(dtype)


def _shifted(x0: Tensor, layer_weights: Tensor | None) -> Tensor:
    h = x0.to(torch.promote_types(x0.dtype, torch.float32))
    return h if layer_weights is None else h + layer_weights.to(h.dtype)


def norm_keys_backward(
    grad: Tensor, x0: Tensor, layer_weights: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dX -> dX0, dE, dLN1 weight, dLN1 bias; the norm's statistics are computed again, X0 is all that was kept."""
    h = _shifted(x0, layer_weights)
    weight, bias = weight.to(h.dtype), bias.to(h.dtype)
    _, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, NORM_EPS)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad.to(h.dtype), h, h.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    return dh.to(x0.dtype), None if layer_weights is None else dh.sum(0), dweight, dbias


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
