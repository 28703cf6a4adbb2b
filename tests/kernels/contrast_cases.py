"""InfoNCE in plain torch, with every score at once, and random texts for it: what `contrast` is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def eager(
    rows: Tensor, others: Tensor, partners: Tensor, *, temperature: float, dims: Any = None,
    row_keys: Tensor | None = None, other_keys: Tensor | None = None, margin: float | None = None,
    factor: float | None = None,
) -> Tensor:  # fmt: skip
    """As `mlpool_kernels.contrast.contrast`, in the precision of what is given."""

    def cosines(d: int) -> Tensor:
        return F.normalize(rows[:, :d], dim=1) @ F.normalize(others[:, :d], dim=1).T

    hidden = torch.zeros(len(rows), len(others), dtype=torch.bool)
    if row_keys is not None and other_keys is not None:
        (own, theirs), (key, companion) = row_keys.T[..., None], other_keys.T
        hidden = (key == own) | (key == theirs) | (companion == own)
    if margin is not None or factor is not None:
        c = cosines(rows.shape[1])
        partner = c.gather(1, partners[:, None])
        bounds = [partner + margin] if margin is not None else []
        bounds += [partner * factor] if factor is not None else []
        hidden = hidden | (c > torch.stack(bounds).amin(0))
    hidden = hidden.scatter(1, partners[:, None], False)
    scores = [(cosines(d) / temperature).masked_fill(hidden, -math.inf) for d in dims or [rows.shape[1]]]
    return torch.stack([F.cross_entropy(s, partners, reduction="none") for s in scores])


def texts(n: int, m: int, hidden: int, dtype: torch.dtype, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """(rows, others, partners), and the options with keys for masks."""
    generator = torch.Generator().manual_seed(n + m + hidden)
    rows, others = (torch.randn(k, hidden, generator=generator, dtype=torch.float64).to(dtype) for k in (n, m))
    partners = torch.randperm(m, generator=generator)[:n]
    # The partner is near, as training makes it; the others are spread.
    others[partners] += rows.to(dtype)
    options = {"temperature": 0.1, **options}
    if options.pop("keys", False):
        other_keys = torch.randint(0, 3 * m, (m, 2), generator=generator)
        row_keys = torch.stack([torch.randint(0, 3 * m, (n,), generator=generator), other_keys[partners, 0]], 1)
        options |= {"row_keys": row_keys, "other_keys": other_keys}
    return (rows, others, partners), options


def results(run: Any, rows: Tensor, others: Tensor, partners: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Losses, and both gradients of their sum with fixed weights, in float64."""
    rows, others = (x.detach().requires_grad_() for x in (rows, others))
    loss = run(rows, others, partners, **options)
    weights = torch.linspace(0.2, 1, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss)
    grads = torch.autograd.grad((loss * weights).sum(), [rows, others])
    return [x.detach().double().cpu() for x in (loss, *grads)]


def assert_three_ways(run: Any, arguments: tuple, options: dict[str, Any]) -> None:
    """Losses within twice the error of eager in the same dtype, gradients within three times."""
    rows, others, partners = arguments
    got = results(run, *arguments, options)
    low = results(eager, *arguments, options)
    exact = results(eager, rows.double(), others.double(), partners, options)
    for name, times, mine, theirs, truth in zip(("loss", "rows", "others"), (2, 3, 3), got, low, exact, strict=True):
        # What one rounding of a score makes of the loss, whatever the dtype of the texts.
        least = torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps / options["temperature"]
        error, allowed = ((x - truth).norm() / truth.norm() for x in (mine, theirs))
        assert error <= max(times * allowed, least), f"{name}: {error:.1e}, eager's is {allowed:.1e}"


# Tiles that end inside texts and columns; prefixes at odd places; a row longer than a tile.
SIZES = [(9, 20, 7), (70, 150, 40), (33, 300, 24)]
OPTIONS = {
    "plain": {}, "keys": {"keys": True}, "margin": {"margin": 0.2, "factor": 0.9},
    "prefixes": {"dims": [3, 7], "keys": True}, "all": {"dims": [2, 5], "keys": True, "margin": 0.1},
}  # fmt: skip
