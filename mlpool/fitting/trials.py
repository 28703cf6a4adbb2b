"""One pool trained on kept states, and scored on dev pairs."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from torch import Tensor, nn

from ..embedder.calibration import ENOUGH
from ..pooling.base import Pool
from ..training.losses import InfoNCE
from ..training.steps import Rows
from .config import FitConfig
from .states import KeptStates

_AT_ONCE = 512  # texts of a forward that scores


class DevSet(NamedTuple):
    """Scored pairs, their texts as rows of the kept states."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    scores: Sequence[float]


@dataclass(frozen=True)
class Trial:
    """What a training gave.

    Attributes:
        dev, test: mean Spearman, None where it diverged or there is no such set. start: dev before the first step.
        loss: of the last step.
    """

    dev: float | None
    start: float
    seconds_a_step: float
    loss: float | None
    test: float | None = None


class PoolOnStates(nn.Module):
    """A pool over kept states in the place of a model: to a loss, a text is one token, whose id is its row."""

    packed = True  # to the loss: texts of all columns may share a forward, there is no padding

    def __init__(self, pool: Pool, states: KeptStates, device: torch.device) -> None:
        super().__init__()
        self.pool, self._states, self._device = pool, states, device

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """input_ids [1, B], the B texts packed, a token each → sentence_embedding [B, D]."""
        return {"sentence_embedding": self.embed(features["input_ids"][0].cpu().numpy())}

    def embed(self, rows: NDArray[np.int64]) -> Tensor:
        return self.pool(layer_states=self._states.rows(rows).to(self._device))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def embed_all(self, rows: NDArray[np.int64]) -> Tensor:
        """[n, D] float32, some at once."""
        parts = np.array_split(rows, max(1, len(rows) // _AT_ONCE))
        return torch.cat([self.embed(part).float() for part in parts])

    def calibrate(self, rows: NDArray[np.int64]) -> None:
        """Set the whitening of the pool by some of the rows."""
        some = np.random.default_rng(0).permutation(rows)[: ENOUGH * self._states.shape[2]]
        with self.pool.unnormalized():
            embeddings = self.embed_all(some)
        self.pool.calibrate(embeddings)


def try_pool(
    pool: Pool, states: KeptStates, pairs: NDArray[np.int64], dev: Sequence[DevSet], test: Sequence[DevSet],
    config: FitConfig, rate: float, seed: int, device: torch.device, bar: Any,
) -> Trial:  # fmt: skip
    """Train a pool, in place.

    Args:
        pairs: [pairs, columns], rows of the states: anchor, positive, negatives. rate: the highest learning rate;
            the parts of a pool keep the proportion of their own.
        bar: of steps.

    Raises:
        ValueError: not one batch of different texts can be made.
    """
    model = PoolOnStates(pool.to(device), states, device)
    if pool.uncalibrated:
        model.eval().calibrate(np.unique(pairs))
    start = dev_score(model.eval(), dev)
    loss = InfoNCE(model, **{"cached": False, "mini_batch_tokens": None, **config.loss})
    optimizer = torch.optim.AdamW(pool.parameter_groups(rate), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, config))
    model.train()
    began, value = time.perf_counter(), math.nan
    for step, rows in enumerate(itertools.islice(batches(pairs, config.batch_size, seed), config.max_steps), 1):
        ids = torch.from_numpy(pairs[rows]).to(device)
        made = loss([{"input_ids": c, "attention_mask": torch.ones_like(c)} for c in ids.split(1, 1)])
        optimizer.zero_grad()
        made.backward()
        norm = nn.utils.clip_grad_norm_(pool.parameters(), 1.0)
        value = made.item()
        if not (math.isfinite(value) and bool(norm.isfinite())):
            bar.update(config.max_steps - step + 1)
            return Trial(None, start, (time.perf_counter() - began) / step, None)
        optimizer.step()
        schedule.step()
        bar.update()
    seconds = (time.perf_counter() - began) / config.max_steps
    model.eval()
    return Trial(dev_score(model, dev), start, seconds, value, dev_score(model, test) if test else None)


def _share(step: int, config: FitConfig) -> float:
    """Of the highest learning rate: up in warmup_steps, down to 0 in the rest."""
    rise = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    return min(rise, (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps))


def batches(pairs: NDArray[np.int64], size: int, seed: int) -> Iterator[list[int]]:
    """Rows of `pairs` without end, `size` at a time, no text twice in a batch: a text would be its own negative."""
    table: Any = Rows(pairs)
    sampler = NoDuplicatesBatchSampler(table, size, drop_last=True, generator=torch.Generator(), seed=seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        filled = False
        for batch in sampler:
            filled = True
            yield batch
        if not filled:
            raise ValueError(
                f"not one batch of {size} can be filled from {len(pairs)} pairs of {len(np.unique(pairs))} different "
                "texts, each pair with texts of its own; lower batch_size"
            )


@torch.inference_mode()
def dev_score(model: PoolOnStates, sets: Sequence[DevSet]) -> float:
    """Spearman of cosines with the scores, mean of the sets; 0 of a set whose cosines are all alike."""
    from scipy.stats import spearmanr

    found = []
    for first, second, scores in sets:
        rows, inverse = np.unique(np.concatenate([first, second]), return_inverse=True)
        unit = F.normalize(model.embed_all(rows), dim=-1)[torch.from_numpy(inverse)]
        cosines = (unit[: len(first)] * unit[len(first) :]).sum(1).cpu().numpy()
        found.append(float(spearmanr(cosines, scores).statistic) if np.ptp(cosines) > 1e-6 else 0.0)
    return mean(found)
