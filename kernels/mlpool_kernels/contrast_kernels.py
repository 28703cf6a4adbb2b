"""Contrast by Triton: tiles of scores, forward and backward; the mathematics are `contrast.py`'s."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contrast_texts import Texts
from .runtime import capability, ceil_div, dot_options, jit, tl
from .tiles import tile


@jit
def _dot(
    rows, others, acc, row_ok, other_ok,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + the products of the columns from FIRST to LAST; rows [BLOCK_N, 1] and others [1, BLOCK_M] are pointers."""
    for first in range(FIRST, LAST, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < LAST
        a = tl.load(rows + column[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        b = tl.load(others + column[:, None], mask=inside[:, None] & other_ok[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@jit
def _contrast_kernel(
    rows, others, row_scale, other_scale, partners, row_keys, other_keys, bound, logs, grad_logs, grad_partners,
    out, partner_out, row_sums, other_sums, N, M, inverse_temperature,
    HIDDEN: tl.constexpr, STAGES: tl.constexpr, PREFIXES: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of scores. Forward: out [P, tiles of M, N], each row's log Σ exp, and partner_out [P, N].

    Backward, from logs [P, N] and the gradients by logs and partners: out [P, N, M], each prefix's own part of H, and
    the sums of ∂loss/∂c · c, row_sums [P, tiles of M, N] and other_sums [P, tiles of N, M]. STAGES are 0, the
    prefixes, and behind them D where only the bound needs it.
    """
    # GROUP tiles of rows go through all others together: what one program reads of either, the rest find in L2.
    row_tiles = (N + BLOCK_N - 1) // BLOCK_N
    other_tiles = (M + BLOCK_M - 1) // BLOCK_M
    group = tl.program_id(0) // (GROUP * other_tiles)
    place = tl.program_id(0) % (GROUP * other_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + place % size
    other_tile = place // size
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    other = other_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < N
    other_ok = other < M
    a = rows + row.to(tl.int64)[:, None] * HIDDEN
    b = others + other.to(tl.int64)[None, :] * HIDDEN

    LAST_STAGE: tl.constexpr = len(STAGES) - 2
    if bound is not None:
        limit = tl.load(bound + row, mask=row_ok, other=float("inf"))
        if LAST_STAGE > 0:
            # The bound judges by all of D, before the first prefix is through.
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            acc = _dot(a, b, acc, row_ok, other_ok, 0, HIDDEN, BLOCK_D, PRECISION, UPCAST)
            scale_a = tl.load(row_scale + LAST_STAGE * N + row, mask=row_ok, other=0.0)
            scale_b = tl.load(other_scale + LAST_STAGE * M + other, mask=other_ok, other=0.0)
            below = tl.where(acc * scale_a[:, None] * scale_b[None, :] > limit[:, None], 0, 1)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for p in tl.static_range(PREFIXES):
        acc = _dot(a, b, acc, row_ok, other_ok, STAGES[p], STAGES[p + 1], BLOCK_D, PRECISION, UPCAST)
        scale_a = tl.load(row_scale + p * N + row, mask=row_ok, other=0.0)
        scale_b = tl.load(other_scale + p * M + other, mask=other_ok, other=0.0)
        cosine = acc * scale_a[:, None] * scale_b[None, :]
        # 0 where hidden, for numbers are 0 or more: one mask, worked out where it is used, takes the fewest registers.
        partner = tl.load(partners + row, mask=row_ok, other=0)
        is_partner = other[None, :] == partner[:, None]
        differs = tl.minimum(other[None, :] ^ partner[:, None], other_ok.to(tl.int32)[None, :])
        if row_keys is not None:
            own = tl.load(row_keys + 2 * row, mask=row_ok, other=0)[:, None]
            theirs = tl.load(row_keys + 2 * row + 1, mask=row_ok, other=0)[:, None]
            key = tl.load(other_keys + 2 * other, mask=other_ok, other=0)[None, :]
            companion = tl.load(other_keys + 2 * other + 1, mask=other_ok, other=0)[None, :]
            differs = tl.minimum(tl.minimum(differs, key ^ own), tl.minimum(key ^ theirs, companion ^ own))
        if bound is not None:
            if LAST_STAGE == 0:
                below = tl.where(cosine > limit[:, None], 0, 1)  # what is no number is not hidden
            differs = tl.minimum(differs, below)
        hidden = differs == 0
        score = cosine * inverse_temperature
        if BACKWARD:
            log = tl.load(logs + p * N + row, mask=row_ok, other=0.0)
            grad = tl.load(grad_logs + p * N + row, mask=row_ok, other=0.0)
            grad_partner = tl.load(grad_partners + p * N + row, mask=row_ok, other=0.0)
            weight = tl.where(hidden, 0.0, tl.exp(score - log[:, None]) * grad[:, None])
            weight = tl.where(is_partner, grad_partner[:, None], weight)
            along = weight * cosine
            tl.store(row_sums + (p * other_tiles + other_tile) * N + row, tl.sum(along, 1), mask=row_ok)
            tl.store(other_sums + (p * row_tiles + row_tile) * M + other, tl.sum(along, 0), mask=other_ok)
            weight = weight * scale_a[:, None] * scale_b[None, :]
            target = out + (p * N + row.to(tl.int64))[:, None] * M + other[None, :]
            tl.store(target, weight.to(out.dtype.element_ty), mask=row_ok[:, None] & other_ok[None, :])
        else:
            has = tl.sum(is_partner.to(tl.int32), 1) > 0
            value = tl.sum(tl.where(is_partner, score, 0.0), 1)
            tl.store(partner_out + p * N + row, value, mask=row_ok & has)
            score = tl.where(hidden, float("-inf"), score)
            most = tl.max(score, 1)
            most = tl.where(most == float("-inf"), 0.0, most)
            log = most + tl.log(tl.sum(tl.exp(score - most[:, None]), 1))
            tl.store(out + (p * other_tiles + other_tile) * N + row, log, mask=row_ok)


def forward_triton(b: Texts, stages: Sequence[int], temperature: float, positives: Tensor) -> Tensor:
    t = tile_of(b, stages)
    parts = positives.new_empty(len(positives), ceil_div(len(b.others), t["BLOCK_M"]), len(b.rows))
    _launch(b, stages, temperature, t, len(positives), out=parts, partner_out=positives)
    return parts.logsumexp(1)


def weights_triton(
    b: Texts, stages: Sequence[int], temperature: float, logs: Tensor, grads: Tensor, row_sums: Tensor,
    other_sums: Tensor,
) -> Tensor:  # fmt: skip
    t = tile_of(b, stages)
    prefixes, n, m = len(logs), len(b.rows), len(b.others)
    out = b.rows.new_empty(prefixes, n, m)
    row_parts = logs.new_empty(prefixes, ceil_div(m, t["BLOCK_M"]), n)
    other_parts = logs.new_empty(prefixes, ceil_div(n, t["BLOCK_N"]), m)
    given = (logs.contiguous(), *(g.contiguous() for g in grads))
    _launch(b, stages, temperature, t, prefixes, given, out=out, row_sums=row_parts, other_sums=other_parts)
    row_sums += row_parts.sum(1)
    other_sums += other_parts.sum(1)
    return out


def tile_of(t: Texts, stages: Sequence[int]) -> dict[str, int]:
    """Between stages a tile waits in registers beside what becomes of it: smaller ones."""
    name = "contrast" if len(stages) == 1 else "contrast_stages"
    return tile(name, t.rows.shape[1], wide=t.rows.dtype == torch.float32, capability=capability(t.rows))


def _launch(
    b: Texts, stages: Sequence[int], temperature: float, t: dict[str, int], prefixes: int,
    given: Sequence[Tensor] = (), *, out: Tensor, partner_out: Tensor | None = None, row_sums: Tensor | None = None,
    other_sums: Tensor | None = None,
) -> None:  # fmt: skip
    """given: N and the gradients by N and P, for the backward."""
    n, m, hidden = len(b.rows), len(b.others), b.rows.shape[1]
    grid = (ceil_div(n, t["BLOCK_N"]) * ceil_div(m, t["BLOCK_M"]),)
    with torch.cuda.device_of(b.rows):
        _contrast_kernel[grid](
            b.rows, b.others, b.row_scale, b.other_scale, b.partners, b.row_keys, b.other_keys, b.bound,
            *(given or (None, None, None)), out, partner_out, row_sums, other_sums, n, m, 1 / temperature, hidden,
            (0, *stages), prefixes, bool(given), **t, **dot_options(b.rows.dtype),
        )  # fmt: skip
