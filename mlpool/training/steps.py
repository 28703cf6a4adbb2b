"""How many steps a training really makes: what the batch sampler can fill, before anything is loaded."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from sentence_transformers.base.sampler import BatchSamplers, NoDuplicatesBatchSampler

from ..corpus.rows import BATCH
from .columns import count, text_columns

_WITHOUT_DUPLICATES = (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED)


class Steps(NamedTuple):
    """Optimizer steps that are made, and that the arguments ask for."""

    made: int
    asked: int


def count_steps(pairs: datasets.Dataset, arguments: Any, processes: int) -> Steps:
    """The steps of a training of `pairs` by SentenceTransformerTrainingArguments.

    The no-duplicates sampler promises rows / batch batches an epoch and may fill fewer, as each pair of a batch needs
    texts of its own; then an epoch ends early, and so does the training. Where repeated texts may matter, its epochs
    are gone through, with the seeds that they will have.

    Raises:
        ValueError: not one step; with the counts.
    """
    size, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    whole = len(pairs) // size if arguments.dataloader_drop_last else math.ceil(len(pairs) / size)
    promised = whole // processes
    an_epoch, asked = math.ceil(promised / accumulated), asked_steps(promised, arguments)
    made = 0
    if an_epoch:
        for filled in filled_batches(pairs, arguments, size, whole, math.ceil(asked / an_epoch)):
            batches = min(filled // processes, promised)
            # What is left of an accumulation steps at the end of a promised epoch alone.
            made += an_epoch if batches == promised else batches // accumulated
            if made >= asked:
                break
    made = min(made, asked)
    if not made:
        raise ValueError(_nothing(pairs, arguments, size, processes))
    return Steps(made, asked)


def asked_steps(promised: int, arguments: Any) -> int:
    """The steps that the arguments ask for, where an epoch has `promised` batches for each process."""
    an_epoch = math.ceil(promised / arguments.gradient_accumulation_steps)
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)


def filled_batches(pairs: datasets.Dataset, arguments: Any, size: int, whole: int, epochs: int) -> Iterator[int]:
    """The batches of all processes, by epoch; `whole` where it is sure that there are as many."""
    if arguments.batch_sampler in _WITHOUT_DUPLICATES:
        texts = text_ids(pairs)
        if not always_fills(texts, size, whole):
            rows: Any = Rows(texts)
            sampler = NoDuplicatesBatchSampler(
                rows, size, arguments.dataloader_drop_last, generator=torch.Generator(), seed=arguments.seed
            )
            for epoch in range(epochs):
                sampler.set_epoch(epoch)
                yield sum(1 for _ in sampler)
            return
    yield from (whole for _ in range(epochs))


def text_ids(pairs: datasets.Dataset) -> np.ndarray:
    """[rows, columns] int64, equal where the texts are."""
    columns = []
    for name in text_columns(pairs):
        batches = pairs.select_columns(name).with_format(None).iter(BATCH)
        columns.append(np.fromiter((hash(text) for batch in batches for text in batch[name]), np.int64, len(pairs)))
    return np.stack(columns, axis=1)


def always_fills(texts: np.ndarray, size: int, whole: int) -> bool:
    """Whether the sampler fills `whole` batches of `size` in every order of the rows.

    A batch stays unfilled only if each remaining row shares a text with one of its fewer than `size` rows. A row shares
    texts with `most` others at most, so then (size - 1) (most + 1) rows remain at most. The sampler goes through the
    rows three times where once was not enough, if once gave a batch.
    """
    _, inverse, counts = np.unique(texts, return_inverse=True, return_counts=True)
    most = int((counts[inverse.reshape(texts.shape)] - 1).sum(axis=1).max(initial=0))
    free = len(texts) - (size - 1) * (most + 1)
    sure = max(0, math.ceil(free / size))
    return sure >= whole or (sure > 0 and 3 * sure >= whole)


class Rows:
    """Rows of ids in memory, in the place of a Dataset of texts."""

    def __init__(self, ids: np.ndarray) -> None:
        self.column_names = [str(i) for i in range(ids.shape[1])]
        self._rows = ids.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, int]:
        return dict(zip(self.column_names, self._rows[row], strict=True))


def _nothing(pairs: datasets.Dataset, arguments: Any, size: int, processes: int) -> str:
    texts = text_ids(pairs)
    rows = {tuple(row) for row in texts.tolist()}
    repeated = arguments.batch_sampler in _WITHOUT_DUPLICATES and len(pairs) >= size * processes
    why = "each pair of a batch needs texts of its own" if repeated else "a batch is full or not used"
    what = "or batch_sampler: batch_sampler (repeated texts become false negatives)" if repeated else (
        "or dataloader_drop_last: false" if arguments.dataloader_drop_last and processes == 1 else "or use more pairs"
    )  # fmt: skip
    return (
        f"nothing would be trained: not one batch of {size} a device can be filled for {count(processes, 'device')} "
        f"from {count(len(pairs), 'pair')} ({len(rows):,} different, {count(len(np.unique(texts)), 'distinct text')}); "
        f"{why}. Lower per_device_train_batch_size, {what}"
    )
