"""Several sources: what a config may say of them, their shares, and batches of one source alone."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

datasets = pytest.importorskip("datasets")
import torch  # noqa: E402
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler  # noqa: E402
from torch.utils.data import ConcatDataset, RandomSampler  # noqa: E402

from mlpool.training.config import read_config  # noqa: E402
from mlpool.training.mixture import Mixture, TrainingSource, load_mixture, read_sources  # noqa: E402
from mlpool.training.sampling import passes  # noqa: E402


def pairs(name: str, rows: int, columns: int = 2, distinct: int | None = None):
    names = ["anchor", "positive", "negative_1"][:columns]
    return datasets.Dataset.from_dict(
        {column: [f"{name} {column} {row % (distinct or rows)}" for row in range(rows)] for column in names}
    )


def mixture(sizes, weights=None, **options) -> Mixture:
    """Sources a, b, …; the second has negatives where batches are of one source."""
    one = options.get("batches") == "one source"
    weights = weights or [1.0] * len(sizes)
    sources = [
        TrainingSource(name, pairs(name, n, 2 + (one and name == "b")), weight)
        for name, n, weight in zip("abc", sizes, weights, strict=False)
    ]
    return Mixture(sources, **options)


def batches(mixed: Mixture, size: int, processes: int = 1, epoch: int = 0, sampler=NoDuplicatesBatchSampler, seed=42):
    """The rows (source, row) of every batch of an epoch, in their order, as the trainer makes the sampler."""
    generator = torch.Generator().manual_seed(seed)
    parts = list(mixed.dataset().values())
    options = {"drop_last": True, "generator": generator, "seed": seed}
    samplers = [
        sampler(
            part if sampler is NoDuplicatesBatchSampler else RandomSampler(part, generator=generator), size, **options
        )
        for part in parts
    ]
    whole = ConcatDataset(parts)
    made = mixed.sampler(size, processes)(whole, batch_samplers=samplers, generator=generator, seed=seed)
    made.set_epoch(epoch)
    found = [[(whole[row]["anchor"][0], whole[row]["anchor"]) for row in batch] for batch in made]
    assert len(found) == len(made)
    return found


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "weights", "shares"),
    [
        (1.0, [1, 1], [0.9, 0.1]),
        (1.0, [1, 3], [0.75, 0.25]),
        (2.0, [1, 1], [0.75, 0.25]),  # √900 : √100
        (2.0, [1, 3], [0.5, 0.5]),
        (float("inf"), [1, 1], [0.5, 0.5]),
        (float("inf"), [2, 1], [2 / 3, 1 / 3]),
    ],
)
def test_a_source_has_the_share_of_its_weight_and_its_size_to_the_power_of_one_over_temperature(
    temperature, weights, shares
):
    sizes = [900, 100]
    often = passes(sizes, weights, temperature)
    due = [times * n for times, n in zip(often, sizes, strict=True)]
    assert [part / sum(due) for part in due] == pytest.approx(shares)
    assert often[0] == weights[0]  # the largest is not cut short
    # Drawn, in both ways, as is due.
    found = mixture(sizes, weights, temperature=temperature).dataset()["anchor"]
    drawn = Counter(text[0] for text in found)
    assert [drawn[name] for name in "ab"] == pytest.approx(due, abs=1)
    of_one = mixture(sizes, weights, temperature=temperature, batches="one source")
    drawn = Counter(batch[0][0] for batch in batches(of_one, 10))
    assert [drawn[name] * 10 for name in "ab"] == pytest.approx(due, abs=10)


def test_every_pair_is_in_an_epoch_as_often_as_in_another_to_within_one():
    counts = Counter(mixture([40, 6], [1.5, 4]).dataset()["anchor"])
    assert {n for text, n in counts.items() if text[0] == "a"} == {1, 2}
    assert {n for text, n in counts.items() if text[0] == "b"} == {4}


# --- batches of one source --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [NoDuplicatesBatchSampler, DefaultBatchSampler])
def test_batches_of_one_source_are_full_of_different_pairs_and_the_same_again(sampler):
    mixed = mixture([37, 16, 9], [1, 2, 1], batches="one source")
    first = batches(mixed, 4, sampler=sampler)
    assert all(len(batch) == len(set(batch)) == 4 and len({name for name, _ in batch}) == 1 for batch in first)
    assert Counter(batch[0][0] for batch in first) == {"a": 9, "b": 8, "c": 2}
    rows = Counter(row for batch in first for row in batch)
    assert max(rows[row] for row in rows if row[0] == "a") == 1
    assert {rows[row] for row in rows if row[0] == "b"} == {2}  # two passes, each with an order of its own
    ordered = [batch for batch in first if batch[0][0] == "b"]
    assert sorted(map(sorted, ordered[:4])) != sorted(map(sorted, ordered[4:]))
    assert batches(mixed, 4, sampler=sampler) == first
    again = batches(mixed, 4, epoch=1, sampler=sampler)
    assert again != first
    assert {tuple(b) for b in again}.isdisjoint(map(tuple, first))
    assert batches(mixed, 4, sampler=sampler, seed=7) != first


def test_two_processes_take_shares_of_the_order_that_one_takes():
    mixed = mixture([50, 32], batches="one source")
    one, two = batches(mixed, 8), batches(mixed, 4, processes=2)
    assert [a + b for a, b in zip(two[::2], two[1::2], strict=True)] == one


def test_a_source_that_is_smaller_than_a_batch_or_repeats_its_texts_is_named():
    small = mixture([50, 7], batches="one source")
    with pytest.raises(ValueError, match=r"source 'b' cannot fill a batch of 8 .* It has 7 pairs"):
        small.sampler(8, 1)
    with pytest.raises(ValueError, match=r"source 'b' cannot fill a batch of 4 .* each of 2 devices"):
        small.sampler(4, 2)
    same = Mixture(
        [TrainingSource("a", pairs("a", 50)), TrainingSource("b", pairs("b", 50, distinct=3))], batches="one source"
    )
    arguments = SimpleNamespace(
        per_device_train_batch_size=8, gradient_accumulation_steps=1, dataloader_drop_last=True, max_steps=5,
        num_train_epochs=1, batch_sampler="no_duplicates", seed=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="source 'b' cannot fill a batch of 8 pairs with texts of their own"):
        same.count_steps(arguments, 1)
    with pytest.raises(ValueError, match="source 'b' cannot fill a batch of 8 pairs with texts of their own"):
        batches(same, 8)  # no endless search


@pytest.mark.parametrize(
    ("changes", "made"), [({}, 17), ({"max_steps": 5}, 5), ({"gradient_accumulation_steps": 4}, 5)]
)
def test_steps_are_those_of_the_sampler(changes, made):
    arguments = SimpleNamespace(**{
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "dataloader_drop_last": True,
        "max_steps": -1, "num_train_epochs": 1, "batch_sampler": "no_duplicates", "seed": 0, **changes,
    })  # fmt: skip
    mixed = mixture([37, 16], [1, 2], batches="one source")
    assert len(batches(mixed, 4)) == 17
    assert mixed.count_steps(arguments, 1) == (made, made)


def test_sources_with_different_columns_share_no_batch():
    poor, rich = TrainingSource("poor", pairs("a", 9)), TrainingSource("rich", pairs("b", 9, 3))
    with pytest.raises(
        ValueError, match=r"'poor' \(anchor, positive\) and 'rich' \(anchor, positive, negative_1\) have"
    ):
        Mixture([poor, rich]).dataset()
    assert set(Mixture([poor, rich], batches="one source").dataset()) == {"poor", "rich"}


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for name, rows, extra in (("a", 6, {}), ("b", 4, {"negative": "n"})):
        lines = [json.dumps({"query": f"{name}{i}", "positive": f"p{name}{i}", **extra}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_each_source_has_its_own_columns_negatives_limit_and_prompts(files):
    a, b = files
    swapped = {"anchor": "positive", "positive": "query"}
    mixed = load_mixture({
        "train": [{"source": a, "columns": swapped, "limit": 2, "prompts": {"query": "Q "}},
                  {"source": b, "name": "nli", "num_negatives": 0}],
        "limit": 3,
    })  # fmt: skip
    first, second = mixed.sources
    assert (first.name, second.name) == (a, "nli")
    assert first.pairs["anchor"][:] == ["pa0", "pa1"]
    assert second.pairs.column_names == ["anchor", "positive"]
    assert len(second.pairs) == 3
    assert first.column_prompts({"query": "other", "document": "D "}) == {"anchor": "Q ", "positive": "D "}
    assert second.column_prompts({"query": "other"}) == {"anchor": "other"}
    assert mixed.dataset()["dataset_name"][:] == [a] * 2 + ["nli"] * 3


@pytest.mark.parametrize("given", ["a.jsonl", [{"anchor": "x", "positive": "y", "source": "web"}], None])
def test_one_source_stays_what_it_was(given):
    assert read_sources(given) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": [{"source": "a", "wieght": 2}]},
            r"data\.train\.0: unknown key of a source 'wieght'; nearest: weight",
        ),
        ({"train": ["a", {"source": "b", "weight": 0}]}, r"data\.train\.1\.weight is 0, expected greater than 0"),
        ({"train": [{"source": "a", "weight": -1.5}]}, r"weight is -1\.5, expected greater than 0"),
        ({"train": [{"source": "a", "weight": "much"}]}, r"weight is 'much', expected a number"),
        ({"train": [{"source": "a", "prompts": {"anchor": "Q"}}]}, r"unknown key in prompts of a source 'anchor'"),
        ({"train": ["a.jsonl", "b.jsonl", "a.jsonl"]}, r"data\.train\.2: there is a source 'a\.jsonl' before"),
        ({"train": [{"source": "a", "name": "x"}, {"source": "b", "name": "x"}]}, r"there is a source 'x' before"),
        ({"train": [{"source": "a", "name": ""}]}, r"data\.train\.0: the name is empty"),
        ({"train": [{"source": None}]}, r"data\.train\.0 has None as its source, expected a path"),
        ({"train": ["a", 5]}, r"data\.train\.1 has 5 as its source, expected a path"),
        ({"train": "a", "temperature": 0}, r"data\.temperature is 0, expected a number above 0"),
        ({"train": "a", "temperature": -2.0}, r"data\.temperature is -2\.0, expected a number above 0"),
        ({"train": "a", "batches": "one"}, r"data\.batches is 'one', expected 'mixed' or 'one source'"),
        ({"train": "a", "temprature": 2}, "unknown key in data 'temprature'; nearest: temperature"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(data, message):
    with pytest.raises(ValueError, match=message):
        read_config({"model": "m", "output_dir": "o", "data": data})


def test_an_endless_temperature_may_be_said():
    config = read_config({"model": "m", "output_dir": "o", "data": {"train": ["a"], "temperature": float("inf")}})
    assert config.data["temperature"] == float("inf")
