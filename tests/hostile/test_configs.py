"""Configs of trainings and studies, and files of pairs, malformed in every way: errors of ours, or a result."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

pytest.importorskip("datasets")
pytest.importorskip("mteb")

import pyarrow as pa
import pyarrow.parquet as pq
from given import OURS, ROOT, WORDS, cases, mangled, scalar, text, tried, value

from mlpool.fitting.config import _keys as _fit_keys
from mlpool.fitting.config import read_fit_config
from mlpool.study.config import read_study
from mlpool.training.config import _keys, read_config
from mlpool.training.data import load_pairs
from mlpool.training.train import load_scored, training_arguments

READY = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in path.parts)
KEYS = sorted(_keys().__origin__.__annotations__)
NESTED = ["data.limit", "data.columns", "loss.temperature", "lora.rank", "lora.alpha", "pooler.num_heads", "data.train"]


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


def least_study(place: Path) -> dict[str, Any]:
    return {
        "base": str(place / "base"), "data_dir": str(place / "data"), "output": str(place / "out"),
        "data": "pairs.jsonl", "designs": ["mean-bidirectional"],
    }  # fmt: skip


def key(rng: Random, known: list[str]) -> Any:
    """One that is known, mostly; or a text or a number."""
    return rng.choice([rng.choice(known), rng.choice(known), text(rng, 5), rng.randint(-9, 2**70)])


def anything(rng: Random) -> Any:
    return value(rng, lambda: rng.choice([text(rng, 4), rng.randint(-9, 2**70)]))


def test_values_of_any_kind_under_any_key(place):
    for rng in cases(250, "values"):
        config = {**least(place), **{key(rng, KEYS): anything(rng) for _ in range(rng.randint(1, 3))}}
        tried(lambda config=config: read_config(config), config, foreign=False)


def test_any_word_as_an_override(place):
    for rng in cases(60, "overrides"):
        name, word = rng.choice(KEYS + NESTED), rng.choice([rng.choice(WORDS), text(rng, 6)])
        for words in ([f"--{name}", word], [f"--{name}={word}"], [word]):
            tried(lambda words=words: read_config(least(place), words), words, foreign=False)


def test_a_ready_config_with_a_few_bytes_changed(place):
    changed, study = place / "changed.yaml", {name: place / name for name in ("base", "data", "out")}
    for rng in cases(150, "ready"):
        path = rng.choice(READY)
        changed.write_bytes(mangled(path.read_bytes(), rng))
        if "study" in path.parts:
            call = lambda: read_study(changed, base=study["base"], data_dir=study["data"], output=study["out"])  # noqa: E731
        elif "fit" in path.parts:
            call = lambda: read_fit_config(changed)  # noqa: E731
        else:
            call = lambda: read_config(changed)  # noqa: E731
        tried(call, changed.read_bytes(), foreign=False)


def test_what_is_accepted_can_be_written_and_makes_arguments(place):
    simple = ("seed", "max_steps", "learning_rate", "lr_scheduler_type", "save_strategy", "bf16")
    accepted = 0
    for rng in cases(150, "accepted"):
        name = rng.choice([rng.choice(KEYS), rng.choice(simple)])
        given = {**least(place), name: anything(rng)}
        config = tried(lambda given=given: read_config(given), given, foreign=False)
        if config is not None:
            accepted += 1
            written = yaml.safe_load(yaml.safe_dump(config.as_dict()))
            assert tried(lambda written=written: read_config(written), written, ()) == config
            if name in simple:
                tried(lambda config=config: training_arguments(config), given, ())
    assert accepted


def test_values_of_any_kind_in_a_fit(place):
    keys = sorted(_fit_keys().__origin__.__annotations__)
    for rng in cases(150, "fit"):
        fit = {**least(place), "dev": "dev.jsonl", "candidates": [{"pooler": {"num_heads": 2}}], "learning_rate": 1e-3}
        fit |= {rng.choice(keys): anything(rng) for _ in range(rng.randint(1, 3))}
        tried(lambda fit=fit: read_fit_config(fit), fit, foreign=False)


STUDY = [
    "title", "base", "data_dir", "output", "data", "train", "designs", "seeds", "evaluate", "baseline", "search",
    "match_parameters", "untrained", "keep_models",
]  # fmt: skip


def test_values_of_any_kind_in_a_study(place):
    for rng in cases(150, "study"):
        study = {**least_study(place), **{key(rng, STUDY): anything(rng) for _ in range(rng.randint(1, 2))}}
        tried(lambda study=study: read_study(study), study, foreign=False)


def test_sections_of_a_study(place):
    sections: list[dict] = [
        {"grid": {"learning_rate": 1}}, {"grid": {"lora.rank": ["x"]}}, {"grid": {"a": [1]}}, {"per": 3},
    ]  # fmt: skip
    for rng in cases(60, "sections"):
        section = {**rng.choice(sections), "tasks": anything(rng)}
        study = {**least_study(place), rng.choice(["search", "evaluate", "train"]): section}
        tried(lambda study=study: read_study(study), study, foreign=False)


# --- files of pairs ---------------------------------------------------------------------------------------------------

NAMES = ["query", "positive", "negative", "negative_1", "label", "sentence1", "score"]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]


def cell(rng: Random) -> Any:
    return value(rng, lambda: rng.choice(["text", "title", "x"]))


def load(path: Path, cache: Path) -> None:
    """Every way to read it; what is told of it on the way is text, too."""
    for on_error in ("raise", "skip"):
        pairs = tried(
            lambda on_error=on_error: load_pairs(str(path), on_error=on_error, cache_dir=cache),
            path.read_bytes(), foreign=False,
        )  # fmt: skip
        assert pairs is None or pairs.info.description.encode()
    tried(lambda: load_scored(path), path.read_bytes(), foreign=False)


def test_rows_of_any_kind(place):
    for rng in cases(100, "rows"):
        rows = [
            {rng.choice(NAMES): cell(rng) for _ in range(rng.randint(0, 4))} if rng.random() < 0.7 else cell(rng)
            for _ in range(rng.randint(0, 4))
        ]
        lines, kind = [json.dumps(row) for row in rows], rng.choice([".jsonl", ".json"])
        content = "\n".join(lines) if kind == ".jsonl" else f"[{','.join(lines)}]"
        (place / f"rows{kind}").write_text(content, encoding="utf8")
        load(place / f"rows{kind}", place)


def whole(kind: str, path: Path) -> bytes:
    """A good file of this kind, written to `path`."""
    rows = [{"query": f"a {i}", "positive": f"b {i}", "sentence1": "c", "sentence2": "d", "score": i} for i in range(8)]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path.read_bytes()
    lines = [json.dumps(row) for row in rows]
    if "sv" in kind:
        separator = "\t" if ".tsv" in kind else ","
        lines = [separator.join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]]
    content = "\n".join(lines).encode()
    return gzip.compress(content, mtime=0) if kind.endswith(".gz") else content


def test_files_with_a_few_bytes_changed(place):
    good = {kind: whole(kind, place / f"bytes{kind}") for kind in KINDS}
    for rng in cases(100, "bytes"):
        kind = rng.choice(KINDS)
        (place / f"bytes{kind}").write_bytes(mangled(good[kind], rng))
        load(place / f"bytes{kind}", place)


def test_files_of_any_bytes(place):
    for rng in cases(60, "any bytes"):
        kind = rng.choice(KINDS)
        (place / f"any{kind}").write_bytes(rng.randbytes(rng.randint(0, 200)))
        load(place / f"any{kind}", place)


def test_sources_of_any_kind(place, monkeypatch):
    monkeypatch.chdir(place)  # of what lies around the checkout nothing is read
    for rng in cases(60, "sources"):
        source = anything(rng) if rng.random() < 0.7 else scalar(rng)
        tried(lambda source=source: load_pairs(source, cache_dir=place), source, (*OURS, TypeError), foreign=False)
