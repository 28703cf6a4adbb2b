"""Batches of several sources: how often each is drawn, and batches that hold one source alone.

Source: arXiv 1910.10683 (T5), 3.5.2 "temperature-scaled mixing": p ~ n^(1/T).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler

_TRIES = 10  # passes over a source that fill no batch, before that is an error


def passes(sizes: Sequence[int], weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """How often an epoch goes through each source, so that source i has the share w_i n_i^(1/T) / Σ_j w_j n_j^(1/T).

    At T = 1 that is its weight. Above, the largest source is gone through as often as its weight says and the smaller
    ones more often, so that nothing is left out; at T = ∞ the weights alone are the shares.
    """
    return [w * (max(sizes) / n) ** (1 - 1 / temperature) for n, w in zip(sizes, weights, strict=True)]


class OneSourceBatchSampler(MultiDatasetDefaultBatchSampler):
    """Full batches of one source each, in an order of seed and epoch alone.

    A draw is of `together` batches of one source: as many as there are processes, so that what these embed at the same
    time, and may use as each other's negatives, is of one source. An epoch has `draws` of each source, in random order;
    within a source the batches are those of sentence-transformers' sampler, pass after pass, each with a seed of its
    own. What a pass leaves over is less than a draw, and not used.

    Args:
        dataset, batch_samplers, generator, seed: as given by the trainer of sentence-transformers.
        names: of the sources, for messages. draws: of each source in an epoch. together: batches of a draw.
    """

    def __init__(
        self, dataset: Any, batch_samplers: list[Any], generator: torch.Generator | None = None, seed: int = 0, *,
        names: Sequence[str], draws: Sequence[int], together: int,
    ) -> None:  # fmt: skip
        super().__init__(dataset, batch_samplers, generator, seed)
        self._names, self._draws, self._together = names, draws, together

    def __len__(self) -> int:
        return sum(self._draws) * self._together

    def __iter__(self) -> Iterator[list[int]]:
        order = np.repeat(np.arange(len(self._draws)), self._draws)
        np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        sources: list[Any] = self.dataset.datasets
        starts = [0, *itertools.accumulate(map(len, sources))]
        drawn = [self._source(source) for source in range(len(self._draws))]
        for source in order.tolist():
            for batch in next(drawn[source]):
                yield [starts[source] + row for row in batch]

    def _source(self, source: int) -> Iterator[list[list[int]]]:
        """The draws of one source in this epoch, without end."""
        sampler: Any = self.batch_samplers[source]
        empty = 0
        for number in itertools.count(self.epoch * self._draws[source]):
            if self.generator is not None:  # shared by all samplers; each draws its order when its pass begins
                self.generator.manual_seed(self.seed + number)
            sampler.set_epoch(number)
            draw: list[list[int]] = []
            filled = False
            for batch in sampler:
                draw += [batch] if len(batch) == self.batch_size else []
                if len(draw) == self._together:
                    yield draw
                    draw, filled = [], True
            empty = 0 if filled else empty + 1
            if empty == _TRIES:
                raise ValueError(too_few(self._names[source], self.batch_size, self._together))


def too_few(name: str, size: int, together: int) -> str:
    """What to say of a source that fills no draw."""
    devices = "" if together == 1 else f" for each of {together} devices at once"
    return (
        f"the source {name!r} cannot fill a batch of {size} pairs with texts of their own{devices}; lower "
        "per_device_train_batch_size, leave the source out, or mix sources within a batch (data.batches: mixed)"
    )
