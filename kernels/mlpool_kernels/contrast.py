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
float64, the same in torch, by blocks that stay in the cache. Every sum has one order: bitwise the same from run to run.

Source: arXiv 1807.03748 (InfoNCE), 2205.13147 (Matryoshka), 2410.17243 (tiles, and blocks of others in a ring).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import capability, ceil_div, direct, dot_options, jit, tl, untraced, use_triton, wide_dtype
from .tiles import tile

# As torch.nn.functional.normalize: a vector of zeros has cosine 0 to everything.
NORM_EPS = 1e-12
# Numbers of a block of scores, of the weights H that are alive at once on a GPU in bytes, and of what tiles leave.
CACHED_NUMBERS, CUDA_NUMBERS = 1 << 20, 1 << 26
WORKSPACE_BYTES = 128 << 20
PARTS = 1 << 22
NOWHERE = 2**31 - 1
# Beyond, log(1 + exp(x)) is x in float64 too.
LINEAR = 40.0


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


class Texts(NamedTuple):
    """Rows [N,D] against others [M,D], contiguous and of one dtype, or a block of both.

    row_scale [S,N], other_scale [S,M]: inverse lengths of every stage. partners int32 [N]: the place among the others,
    `NOWHERE` where it is not here. row_keys [N,2]: of the text and of its partner, other_keys [M,2] the same,
    where one without a partner has its own twice; int32, both or neither. bound [N]: the highest cosine allowed.
    """

    rows: Tensor
    others: Tensor
    row_scale: Tensor
    other_scale: Tensor
    partners: Tensor
    row_keys: Tensor | None
    other_keys: Tensor | None
    bound: Tensor | None

    def block(self, here: slice, there: slice) -> Texts:
        def cut(x: Tensor | None, part: slice) -> Tensor | None:
            return None if x is None else x[part]

        return Texts(
            self.rows[here], self.others[there], self.row_scale[:, here].contiguous(),
            self.other_scale[:, there].contiguous(), _places(self.partners[here] - there.start, self.others[there]),
            cut(self.row_keys, here), cut(self.other_keys, there), cut(self.bound, here),
        )  # fmt: skip


def _texts(
    rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
    bound: Tensor | None, dims: Sequence[int],
) -> tuple[Texts, list[int]]:  # fmt: skip
    """And the stages: the prefixes, and behind them D where only the bound needs it."""
    hidden = rows.shape[1]
    stages = [*dims] if bound is None or dims[-1] == hidden else [*dims, hidden]
    # A kernel reads memory as if it lay row by row; what a product or a view returns need not.
    rows, others, bound = rows.contiguous(), others.contiguous(), None if bound is None else bound.contiguous()
    scales = (_inverse_lengths(rows, stages), _inverse_lengths(others, stages))
    return Texts(rows, others, *scales, _places(partners, others), *_ranks(row_keys, other_keys), bound), stages


def _places(partners: Tensor, others: Tensor) -> Tensor:
    elsewhere = (partners < 0) | (partners >= len(others))
    return partners.masked_fill(elsewhere, NOWHERE).int()


def _ranks(row_keys: Tensor | None, other_keys: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The keys as int32, equal where they are: the place of each among all, sorted. Half the registers of a tile."""
    if row_keys is None or other_keys is None:
        return None, None
    keys = torch.cat([row_keys, other_keys])
    ranks = torch.searchsorted(keys.flatten().sort().values, keys, out_int32=True)
    return ranks[: len(row_keys)], ranks[len(row_keys) :]


def _segments(stages: Sequence[int]) -> Iterator[slice]:
    """The columns that each stage adds to the one before."""
    yield from map(slice, (0, *stages[:-1]), stages)


def _inverse_lengths(x: Tensor, stages: Sequence[int]) -> Tensor:
    """1 / length of every prefix, [S,N]."""
    parts = [torch.linalg.vector_norm(x[:, part], dim=1, dtype=wide_dtype(x)).square() for part in _segments(stages)]
    return torch.stack(parts).cumsum(0).sqrt().clamp_(min=NORM_EPS).reciprocal()


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
    t, stages = _texts(rows, others, partners, row_keys, other_keys, bound, dims)
    triton = use_triton(backend, rows, others)
    n, m, prefixes = len(rows), len(others), len(dims)
    logs = rows.new_full((prefixes, n), -math.inf, dtype=wide_dtype(rows))
    positives = torch.zeros_like(logs)
    step = _torch_step(rows.device, prefixes)
    if triton:
        step = (max(n, 1), _tile(t, stages)["BLOCK_M"] * max(1, PARTS // max(1, prefixes * n)))
    for here, there in _blocks(n, m, step):
        run = _forward_triton if triton else _forward_torch
        part = run(t.block(here, there), stages, temperature, positives[:, here])
        logs[:, here] = torch.logaddexp(logs[:, here], part)
    return logs, positives


def _forward_triton(b: Texts, stages: Sequence[int], temperature: float, positives: Tensor) -> Tensor:
    t = _tile(b, stages)
    parts = positives.new_empty(len(positives), ceil_div(len(b.others), t["BLOCK_M"]), len(b.rows))
    _launch(b, stages, temperature, t, len(positives), out=parts, partner_out=positives)
    return parts.logsumexp(1)


def _forward_torch(b: Texts, stages: Sequence[int], temperature: float, positives: Tensor) -> Tensor:
    scores, hidden, (at, place) = _scores_torch(b, stages, temperature, len(positives))
    parts = torch.empty_like(positives)
    for part, positive, score in zip(parts, positives, scores, strict=True):
        positive[at] = score[at, place]
        if hidden is not None:
            score.masked_fill_(hidden, -math.inf)
        score[at, place] = -math.inf
        most = score.amax(1)
        most.masked_fill_(most == -math.inf, 0)
        part.copy_(score.sub_(most[:, None]).exp_().sum(1).log_().add_(most))
    return parts


def _scores_torch(
    b: Texts, stages: Sequence[int], temperature: float, prefixes: int
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, Tensor]]:
    """Scores [n,m] of every prefix, what is hidden of them, and the places of partners: rows and columns."""
    wide = b.row_scale.dtype
    rows, others = b.rows.to(wide), b.others.to(wide)
    scores: list[Tensor] = []
    products: Tensor | None = None
    for part in _segments(stages):
        x, y = rows[:, part], others[:, part].T
        products = x @ y if products is None else torch.addmm(products, x, y)
        scores.append(products)
    for score, mine, theirs in zip(scores, b.row_scale, b.other_scale, strict=True):
        score.mul_(mine[:, None] / temperature).mul_(theirs)
    at = (b.partners != NOWHERE).nonzero().flatten()
    hidden = None
    if b.row_keys is not None and b.other_keys is not None:
        (own, theirs), (key, companion) = b.row_keys.T[..., None], b.other_keys.T
        hidden = (key == own).logical_or_(key == theirs).logical_or_(companion == own)
    if b.bound is not None:
        above = scores[-1] > b.bound[:, None] / temperature
        hidden = above if hidden is None else hidden.logical_or_(above)
    return scores[:prefixes], hidden, (at, b.partners[at].long())


# --- backward ------------------------------------------------------------------------------------------------------


@_without_autocast
def backward(
    grad_logs: Tensor, grad_partners: Tensor, logs: Tensor, rows: Tensor, others: Tensor, partners: Tensor,
    row_keys: Tensor | None, other_keys: Tensor | None, bound: Tensor | None, dims: Sequence[int], temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of rows and others, at least float32, from those of N and P; logs: N over all others there are."""
    t, stages = _texts(rows, others, partners, row_keys, other_keys, bound, dims)
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
        run = _weights_triton if triton else _weights_torch
        weights = run(
            block, stages, temperature, logs[:, here], grads[:, :, here], row_sums[:, here], other_sums[:, there]
        )
        for p in reversed(range(prefixes - 1)):
            weights[p] += weights[p + 1]
        a, b = block.rows.to(weights[0].dtype), block.others.to(weights[0].dtype)
        for h, part in zip(weights, _segments(dims), strict=True):
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
    for part, factor in zip(_segments(dims), along, strict=True):
        for here, _ in _blocks(len(x), 1, (max(1, CUDA_NUMBERS // x.shape[1]), 1)):
            grad[here, part].addcmul_(x[here, part], factor[here, None])


def _triton_step(t: Texts, prefixes: int) -> tuple[int, int]:
    numbers = max(1, WORKSPACE_BYTES // (prefixes * t.rows.element_size()))
    others = min(len(t.others), 1 << (math.isqrt(numbers).bit_length() - 1))
    return max(1, numbers // max(1, others)), max(1, others)


def _weights_triton(
    b: Texts, stages: Sequence[int], temperature: float, logs: Tensor, grads: Tensor, row_sums: Tensor,
    other_sums: Tensor,
) -> Tensor:  # fmt: skip
    t = _tile(b, stages)
    prefixes, n, m = len(logs), len(b.rows), len(b.others)
    out = b.rows.new_empty(prefixes, n, m)
    row_parts = logs.new_empty(prefixes, ceil_div(m, t["BLOCK_M"]), n)
    other_parts = logs.new_empty(prefixes, ceil_div(n, t["BLOCK_N"]), m)
    given = (logs.contiguous(), *(g.contiguous() for g in grads))
    _launch(b, stages, temperature, t, prefixes, given, out=out, row_sums=row_parts, other_sums=other_parts)
    row_sums += row_parts.sum(1)
    other_sums += other_parts.sum(1)
    return out


def _weights_torch(
    b: Texts, stages: Sequence[int], temperature: float, logs: Tensor, grads: Tensor, row_sums: Tensor,
    other_sums: Tensor,
) -> list[Tensor]:  # fmt: skip
    scores, hidden, (at, place) = _scores_torch(b, stages, temperature, len(logs))
    weights = []
    for p, (score, log, (grad, grad_partner)) in enumerate(zip(scores, logs, grads.unbind(1), strict=True)):
        mine, theirs = b.row_scale[p], b.other_scale[p]
        weight = torch.sub(score, log[:, None]).exp_()
        if hidden is not None:
            weight.masked_fill_(hidden, 0)
        weight[at, place] = 0
        of_partners = grad_partner[at]
        cosine = score[at, place].mul_(of_partners).mul_(temperature)
        along = score.mul_(weight)
        row_sums[p] += along.sum(1).mul_(grad).mul_(temperature)
        row_sums[p, at] += cosine
        other_sums[p] += torch.mv(along.T, grad).mul_(temperature)
        other_sums[p].index_add_(0, place, cosine)
        weight.mul_((grad * mine)[:, None]).mul_(theirs)
        weight[at, place] = of_partners * mine[at] * theirs[place]
        weights.append(weight)
    return weights


def _tile(t: Texts, stages: Sequence[int]) -> dict[str, int]:
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
        cosines[part] = (a * b).sum(1) * _inverse_lengths(a, [width])[0] * _inverse_lengths(b, [width])[0]
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
