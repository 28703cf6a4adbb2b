"""The number of steps that is promised is the number that the sampler and the trainer make."""

from types import SimpleNamespace
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sentence_transformers.base.sampler import BatchSamplers, NoDuplicatesBatchSampler  # noqa: E402

from mlpool.training.steps import always_fills, count_steps, text_ids  # noqa: E402


def pairs_of(rows: list[tuple[int, int]]) -> Any:
    return datasets.Dataset.from_dict({"anchor": [f"a{a}" for a, _ in rows], "positive": [f"b{b}" for _, b in rows]})


def sampled(pairs: Any, size: int, epochs: int, seed: int, drop_last: bool = True) -> list[int]:
    """Batches of each epoch, of the texts themselves."""
    sampler = NoDuplicatesBatchSampler(pairs, size, drop_last, generator=torch.Generator(), seed=seed)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(len(list(sampler)))
    return found


def arguments(size: int, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "dataloader_drop_last": True,
        "max_steps": -1, "num_train_epochs": 3, "batch_sampler": BatchSamplers.NO_DUPLICATES, "seed": 42, **changes,
    })  # fmt: skip


ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 6), st.integers(0, 3))
def test_steps_are_those_of_the_sampler(rows, size, seed):
    pairs = pairs_of(rows)
    made = sum(sampled(pairs, size, 3, seed))
    if made:
        assert count_steps(pairs, arguments(size, seed=seed), 1) == (made, 3 * (len(rows) // size))
    else:
        with pytest.raises(ValueError, match="nothing would be trained"):
            count_steps(pairs, arguments(size, seed=seed), 1)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_where_every_order_fills_the_sampler_does(rows, size):
    pairs = pairs_of(rows)
    whole = len(rows) // size
    if whole and always_fills(text_ids(pairs), size, whole):
        assert all(sampled(pairs, size, 1, seed) == [whole] for seed in range(8))


def test_different_texts_always_fill_and_a_common_one_may_not():
    different = np.arange(200).reshape(100, 2)
    assert always_fills(different, 8, 12)
    common = different.copy()
    common[:, 1] = 0
    assert not always_fills(common, 8, 12)


@pytest.mark.parametrize(
    ("steps", "processes", "accumulated", "made"),
    [(-1, 1, 1, 30), (-1, 2, 1, 15), (-1, 1, 4, 9), (7, 1, 1, 7), (7, 1, 4, 7)],
)
def test_processes_accumulation_and_max_steps(steps, processes, accumulated, made):
    pairs = pairs_of([(i, i) for i in range(40)])
    given = arguments(4, max_steps=steps, gradient_accumulation_steps=accumulated)
    assert count_steps(pairs, given, processes) == (made, made)


def test_fewer_rows_than_all_devices_take_is_an_error_with_the_counts():
    with pytest.raises(
        ValueError, match=r"batch of 8 a device can be filled for 4 devices from 20 pairs \(20 different"
    ):
        count_steps(pairs_of([(i, i) for i in range(20)]), arguments(8), 4)
