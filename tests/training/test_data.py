"""Training pairs of every common source: files, folders, tables, the Hub; several at once, and of any size."""

import importlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("datasets")

import datasets
import pair_files
import pyarrow as pa
from pair_files import PAIRS, WANT, lines, negatives, pair, ragged, write

from mlpool.training import data as data_module
from mlpool.training.data import describe, load_pairs

cache = pair_files.cache  # a folder of its own for every test


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"]
)
def test_file(tmp_path, name):
    path = write(tmp_path / name, PAIRS)
    for source in (path, str(path)):
        assert load_pairs(source).to_dict() == WANT


def test_json_lines_named_json(tmp_path):
    assert load_pairs(lines(tmp_path / "a.json", *map(json.dumps, PAIRS))).to_dict() == WANT


def test_memory():
    table = datasets.Dataset.from_list(PAIRS)
    assert load_pairs(PAIRS).to_dict() == WANT
    assert load_pairs(table).to_dict() == WANT
    assert load_pairs(table.with_format("numpy")).to_dict() == WANT
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert load_pairs(splits).to_dict() == WANT
    assert len(load_pairs(splits, split="test")) == 1
    with pytest.raises(ValueError, match="no split 'dev'; found: train, test"):
        load_pairs(splits, split="dev")
    assert load_pairs(splits)[0] == load_pairs(PAIRS)[0]


def test_saved_dataset(tmp_path):
    table = datasets.Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert load_pairs(tmp_path / name).to_dict() == WANT


def test_folder_takes_the_split(tmp_path):
    """A test file beside a training file is not trained on."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "train-00000-of-00001.parquet", PAIRS[2:])
    write(tmp_path / "a_train.jsonl", PAIRS[:2])
    write(tmp_path / "test.jsonl", PAIRS)
    write(tmp_path / "dev.csv", PAIRS[:1])
    write(tmp_path / ".hidden.jsonl", PAIRS)
    (tmp_path / "README.md").write_text("text")
    assert load_pairs(tmp_path).to_dict() == WANT
    assert len(load_pairs(tmp_path, split="validation")) == 1
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file for the split 'validation'.*a_train.jsonl"):
        load_pairs(tmp_path, split="validation")


def test_folder_without_splits(tmp_path):
    write(tmp_path / "b.jsonl", PAIRS[2:])
    write(tmp_path / "a.csv", PAIRS[:2])
    assert load_pairs(tmp_path).to_dict() == WANT


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"holds no data: looked for .jsonl.* found notes.txt"):
        load_pairs(tmp_path)


def test_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_pairs("owner/name").to_dict() == WANT
    assert load_pairs("owner/name:pair", split="train[:10%]").to_dict() == WANT
    assert calls == [("owner/name", None, "train"), ("owner/name", "pair", "train[:10%]")]


def test_hub_unreachable(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-pairs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'my-pair' is neither a path here \(near it: my-pairs\) nor .*no r"):
        load_pairs("my-pair")


def test_missing_file(tmp_path):
    write(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(FileNotFoundError, match=r"no file .*trian.jsonl \(near it: train.jsonl\)"):
        load_pairs(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        load_pairs(tmp_path / "nowhere" / "a.jsonl")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "a source is a path.*got int"),
        ([], ValueError, "list of sources or rows is empty"),
        ({"path": "a.jsonl"}, ValueError, "a source given as dict has 'source'"),
        ({"source": PAIRS, "weight": 0}, ValueError, "weight must be a number above 0, got 0"),
        ({"source": PAIRS, "limit": -1}, ValueError, "limit must be an integer of at least 1, got -1"),
        (datasets.Dataset.from_list([]), ValueError, "no known columns. Found: none"),
        (datasets.Dataset.from_list(PAIRS).select([]), ValueError, "dataset is empty: it has no rows"),
    ],
)
def test_wrong_source(source, error, message):
    with pytest.raises(error, match=message):
        load_pairs(source)


@pytest.mark.parametrize(
    "options", [{"positives": "all"}, {"on_error": "ignore"}, {"num_negatives": -1}, {"num_negatives": 1.5}]
)
def test_wrong_option(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_pairs(PAIRS, **options)


# --- several sources, limits, weights ------------------------------------------------------------------------------


def test_mixed_sources(tmp_path):
    """Each by its own columns; the common number of negatives; in their order."""
    bge = write(tmp_path / "bge.jsonl", ragged(2, 3))
    table = datasets.Dataset.from_list([{"anchor": "a", "positive": "b", "negative": "c"}])
    pairs = load_pairs([bge, table, {"source": str(bge), "limit": 1}])
    assert pairs["anchor"][:] == ["q0", "q1", "a", "q0"]
    assert [len(n) for n in negatives(pairs)] == [1] * 4
    assert pairs.info.description.splitlines()[1:4] == [
        f"{bge}: 2 pairs of 2 rows (anchor = query, positive = pos, negative = neg)",
        "dataset: 1 pair of 1 row (anchor = anchor, positive = positive, negative = negative)",
        f"{bge}: 1 pair of 1 row (anchor = query, positive = pos, negative = neg)",
    ]
    with pytest.raises(ValueError, match=r"4 of 6 pairs have no negatives \(first rows\[0\]\), others up to 3"):
        load_pairs([bge, {"source": PAIRS}])
    assert len(load_pairs([bge, {"source": PAIRS}], num_negatives=0)) == 6


def test_options_of_a_source(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", PAIRS)
    write(tmp_path / "d" / "test.jsonl", PAIRS[:1])
    own = [{"source": [{"x": "a", "y": "b"}], "columns": {"anchor": "x", "positive": "y"}},
           {"source": str(tmp_path / "d"), "split": "test"}, tmp_path / "d"]  # fmt: skip
    assert load_pairs(own, limit=3)["anchor"][:] == ["a", "question 0", "question 0", "question 1", "question 2"]


def test_limit_stops_reading(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[pair(f"q{i}", ["a", "b", "c"]) for i in range(10)], "broken")
    assert load_pairs(path, limit=4)["anchor"][:] == ["q0", "q0", "q0", "q1"]
    assert load_pairs(path, limit=30).num_rows == 30
    with pytest.raises(ValueError, match=r"a.jsonl:11"):
        load_pairs(path, limit=31)
    write(tmp_path / "b.jsonl", PAIRS)
    assert load_pairs(tmp_path, limit=30).num_rows == 30


@pytest.mark.parametrize(("weight", "rows"), [(2, 200), (0.5, 50), (1.25, 125), (1e-9, 1), (1, 100)])
def test_weight(weight, rows):
    table = [{"query": f"q{i}", "positive": "p"} for i in range(100)]
    pairs = load_pairs([{"source": PAIRS}, {"source": table, "weight": weight}, {"source": PAIRS}])
    assert pairs["anchor"][:4] == pairs["anchor"][-4:] == WANT["anchor"]
    counts = Counter(pairs["anchor"][4:-4])
    assert counts.total() == rows
    assert all(int(weight) <= n <= int(weight) + 1 for n in counts.values())
    if weight == 0.5:
        got = [int(q[1:]) for q in pairs["anchor"][4:-4]]
        assert got == sorted(got) != list(range(50))


# --- size ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(tmp_path):
    """40 MiB of text: what Python holds at a time is a batch, and Arrow's file is mapped, not read."""
    row = pair("q" * 20, "p" * 4000) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 10_000)
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    pairs = load_pairs(tmp_path / "a.jsonl", cache_dir=tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.num_rows == 10_000
    assert peak < 16 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert pa.total_allocated_bytes() - held < 2**20
    assert pairs.cache_files[0]["filename"].startswith(str(tmp_path))


def test_files_go_when_the_process_ends(tmp_path):
    code = (
        "import sys; from mlpool.training.data import load_pairs\n"
        "pairs = load_pairs([{'query': 'a', 'positive': 'b'}], cache_dir=sys.argv[1])\n"
        "print(pairs.cache_files[0]['filename'])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, data_module.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"training data needs datasets: pip install 'mlpool\[train\]'"):
        importlib.import_module(data_module.__name__)


# --- real data and what trains on it -------------------------------------------------------------------------------


def test_real_pairs(data_dir):
    """All three sets, against json and str.split."""
    files = sorted((data_dir / "pairs").glob("*/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    pairs = load_pairs(data_dir / "pairs")
    assert pairs["anchor"][:] == [row["query"] for row in rows]
    assert pairs["positive"][:] == [row["positive"] for row in rows]
    table = [line.split() for line in describe(pairs).splitlines()]
    for line, name in zip(table[1:], ("query", "positive"), strict=True):
        texts = [row[name] for row in rows]
        words = np.array([len(t.split()) for t in texts])
        want = [len(texts), len(texts) - len(set(texts)), words.mean(), np.percentile(words, 95), words.max()]
        np.testing.assert_allclose([float(c.replace(",", "")) for c in line[1:]], want, atol=0.5)


def test_real_scores_are_no_positives(data_dir):
    with pytest.raises(ValueError, match="with a column 'score' some rows may be no positives"):
        load_pairs(data_dir / "sts" / "stsb" / "train_strict.jsonl")


def test_describe_tokens():
    rows = [{"query": "a b", "positive": "p" * n} for n in (1, 5, 9)]
    letters = lambda _, texts: [len(text) for text in texts]  # noqa: E731
    table = describe(load_pairs(rows), letters, max_length=4).splitlines()
    assert table[0].split("  ")[-1] == "truncated"
    assert table[1].split() == ["anchor", "3", "2", "2.0", "2", "2", "3.0", "3", "3", "0"]
    assert table[2].split() == ["positive", "3", "0", "1.0", "1", "1", "5.0", "9", "9", "2"]
    assert len({len(line) for line in table}) == 1


def test_no_duplicates_sampler():
    """sentence-transformers' sampler reads the columns: pairs of one anchor never share a batch."""
    samplers = pytest.importorskip("sentence_transformers.base.sampler")
    rows = [{"query": f"q{i}", "pos": [f"p{i}.{k}" for k in range(3)], "neg": [f"n{i}"]} for i in range(20)]
    pairs = load_pairs(rows)
    batches = list(samplers.NoDuplicatesBatchSampler(pairs, batch_size=8, drop_last=False, valid_label_columns=[]))
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    for batch in batches:
        assert len({pairs[i]["anchor"] for i in batch}) == len(batch)
