"""Configs of trainings and studies, and files of pairs, malformed in every way: errors of ours, or a result."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("mteb")

import pyarrow as pa
import pyarrow.parquet as pq
from given import ROOT, hostile, ours

from mlpool.fitting.config import _keys as _fit_keys
from mlpool.fitting.config import read_fit_config
from mlpool.study import read_study
from mlpool.training.config import _keys, read_config
from mlpool.training.data import load_pairs
from mlpool.training.train import load_scored, training_arguments

READY = [path for path in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in path.parts]
KEYS = sorted(_keys().__origin__.__annotations__)
NESTED = ["data.limit", "data.columns", "loss.temperature", "lora.rank", "lora.alpha", "pooler.num_heads", "data.train"]
WORDS = [
    "@x", "{", "[1", '"', "%", "*a", "&a", "!!int x", "!!python/name:os", "null", "~", "true", "no", ".inf", "-.inf",
    ".nan", "1e-5", "1e999", "-1", "0", "0x1F", "1:30", "007", "9" * 5000, "2024-13-01", "", " ", "\0", "\u2028",
    "\ud800", "é" * 300, "../..", "a.b", "[" * 2000, "{a: " * 500, "<<", "? ", "- ", "| ", "x: y: z", "'",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(WORDS), st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data/pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    return folder


def least(place: Path) -> dict[str, Any]:
    return {"model": str(place / "base"), "data": str(place / "data/pairs.jsonl"), "output_dir": str(place / "out")}


@hostile(250)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5) | st.integers(), VALUES, min_size=1, max_size=3))
def test_values_of_any_kind_under_any_key(place, values):
    with ours():
        read_config({**least(place), **values})


@hostile(100)
@given(st.sampled_from(KEYS + NESTED), st.sampled_from(WORDS) | st.text(max_size=6))
def test_any_word_as_an_override(place, key, word):
    for words in ([f"--{key}", word], [f"--{key}={word}"], [word]):
        with ours():
            read_config(least(place), words)


@hostile(150)
@given(st.sampled_from(READY), st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 20))
def test_a_ready_config_with_a_few_bytes_changed(place, path, at, new, removed):
    text = path.read_bytes()
    at %= len(text)
    (place / "changed.yaml").write_bytes(text[:at] + new + text[at + removed :])
    with ours():
        if "study" in path.parts:
            read_study(place / "changed.yaml", base=place / "base", data_dir=place / "data", output=place / "out")
        elif "fit" in path.parts:
            read_fit_config(place / "changed.yaml")
        else:
            read_config(place / "changed.yaml")


@hostile(150)
@given(st.dictionaries(st.sampled_from(sorted(_fit_keys().__origin__.__annotations__)), VALUES, min_size=1, max_size=3))
def test_values_of_any_kind_in_a_fit(place, values):
    fit = {**least(place), "dev": "dev.jsonl", "candidates": [{"pooler": {"num_heads": 2}}], "learning_rate": 1e-3}
    with ours():
        read_fit_config({**fit, **values})


@hostile(100)
@given(st.sampled_from(KEYS), VALUES)
def test_what_is_accepted_can_be_written_and_makes_arguments(place, key, value):
    with ours():
        config = read_config({**least(place), key: value})
        assert read_config(yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config
    if (
        key in ("seed", "max_steps", "learning_rate", "lr_scheduler_type", "save_strategy", "bf16")
        and "config" in locals()
    ):
        training_arguments(config)


STUDY = [
    "title", "base", "data_dir", "output", "data", "train", "designs", "seeds", "evaluate", "baseline", "search",
    "match_parameters", "untrained", "keep_models",
]  # fmt: skip


@hostile(150)
@given(st.dictionaries(st.sampled_from(STUDY) | st.text(max_size=4), VALUES, min_size=1, max_size=2))
def test_values_of_any_kind_in_a_study(place, values):
    study = {
        "base": str(place / "base"), "data_dir": str(place / "data"), "output": str(place / "out"),
        "data": "pairs.jsonl", "designs": ["mean-bidirectional"],
    }  # fmt: skip
    with ours():
        read_study({**study, **values})


@hostile(60)
@given(
    st.sampled_from([{"grid": {"learning_rate": 1}}, {"grid": {"lora.rank": ["x"]}}, {"grid": {"a": [1]}}, {"per": 3}]),
    st.sampled_from(["search", "evaluate", "train"]), VALUES,
)  # fmt: skip
def test_sections_of_a_study(place, section, name, value):
    study = {
        "base": str(place / "base"), "data_dir": str(place / "data"), "output": str(place / "out"),
        "data": "pairs.jsonl", "designs": ["mean-bidirectional"], name: {**section, "tasks": value},
    }  # fmt: skip
    with ours():
        read_study(study)


# --- files of pairs ---------------------------------------------------------------------------------------------------

CELLS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(WORDS)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "title", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
NAMES = ["query", "positive", "negative", "negative_1", "label", "sentence1", "score"]
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), CELLS, max_size=4) | CELLS, max_size=4)
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]


def load(path: Path, cache: Path) -> None:
    for on_error in ("raise", "skip"):
        with ours():
            load_pairs(str(path), on_error=on_error, cache_dir=cache)
    with ours():
        load_scored(path)


@hostile(100)
@given(ROWS, st.sampled_from([".jsonl", ".json"]))
def test_rows_of_any_kind(place, rows, kind):
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
    (place / f"rows{kind}").write_text(text, encoding="utf8")
    load(place / f"rows{kind}", place)


@hostile(100)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 30))
def test_files_with_a_few_bytes_changed(place, kind, at, new, removed):
    rows = [{"query": f"a {i}", "positive": f"b {i}", "sentence1": "c", "sentence2": "d", "score": i} for i in range(8)]
    text = "\n".join(json.dumps(row) for row in rows)
    if ".csv" in kind or ".tsv" in kind:
        separator = "\t" if ".tsv" in kind else ","
        text = "\n".join(separator.join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)])
    path = place / f"bytes{kind}"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        whole = path.read_bytes()
    else:
        whole = gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode()
    at %= len(whole)
    path.write_bytes(whole[:at] + new + whole[at + removed :])
    load(path, place)


@hostile(60)
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_files_of_any_bytes(place, kind, content):
    (place / f"any{kind}").write_bytes(content)
    load(place / f"any{kind}", place)


@hostile(60)
@given(VALUES)
def test_sources_of_any_kind(place, source):
    with ours(ValueError, OSError, TypeError):
        load_pairs(source, cache_dir=place)
