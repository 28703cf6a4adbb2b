"""Contrast by torch, for CPUs and float64: a block of scores at a time; the mathematics are `contrast.py`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contrast_texts import NOWHERE, Texts, segments


def forward_torch(b: Texts, stages: Sequence[int], temperature: float, positives: Tensor) -> Tensor:
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
    for part in segments(stages):
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


def weights_torch(
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
