"""What an earlier version saved, loads and gives the numbers of then: the folders of tests/data, see write.py there."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mlpool
from mlpool.corpus.embedding_folder import load_embeddings, load_ids
from mlpool.corpus.encode import encode_files
from mlpool.embedder import load

DATA = Path(__file__).parent / "data"
TEXTS = [json.loads(line)["text"] for line in (DATA / "texts.jsonl").read_text(encoding="utf8").splitlines()]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of every folder, and the current directory: paths inside are relative."""
    shutil.copytree(DATA, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    return Path()


def test_a_pool(saved: Path) -> None:
    kept = np.load("pool.npz")
    pool = mlpool.MultiLayerPool.from_pretrained("pool")
    with torch.no_grad():
        embedding = pool(layer_states=torch.from_numpy(kept["states"]))
    np.testing.assert_allclose(embedding, kept["embedding"], atol=1e-5)


def test_an_embedder(saved: Path) -> None:
    embedder = load("embedder", device="cpu", verify=True)
    assert embedder.prompts["query"] == "ask: "
    assert embedder[0].design == "multi-layer-bidirectional"
    np.testing.assert_allclose(embedder.encode(TEXTS), np.load("embedder.npy"), atol=1e-5)


def test_an_adapter(saved: Path) -> None:
    embedder = load("adapter", device="cpu", base="base")
    np.testing.assert_allclose(embedder.encode(TEXTS), np.load("adapter.npy"), atol=1e-5)


def test_embeddings(saved: Path) -> None:
    assert load_ids("encoded") == ["first", "second", "third", "fourth"]
    np.testing.assert_allclose(load_embeddings("encoded", concatenate=True), np.load("embedder.npy"), atol=1e-5)


def test_an_encoding_that_was_cut_off_goes_on(saved: Path) -> None:
    modified = json.loads(Path("cut-off/progress/run.json").read_text())["inputs"][0]["modified"]
    os.utime("texts.jsonl", ns=(modified, modified))
    embedder, encoded = load("embedder", device="cpu"), []
    encode = embedder.encode
    embedder.encode = lambda texts, **options: encoded.extend(texts) or encode(texts, **options)
    encode_files(embedder, "texts.jsonl", "cut-off", id_column="id", shard_size=1, progress=False)
    assert encoded == TEXTS[2:], "shards that were complete are made again"
    np.testing.assert_allclose(load_embeddings("cut-off", concatenate=True), np.load("embedder.npy"), atol=1e-5)


def test_a_study(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mteb")
    from mlpool.evaluation import results
    from mlpool.study import runs, study

    before = results.read("study")
    monkeypatch.setattr(runs, "_processes", lambda todo, *_: pytest.fail(f"{todo} run again") if todo else iter(()))
    study("study/study.yaml", estimate=False)
    assert results.read("study") == before
    assert len({row.score for row in before}) > 2
    assert all(row.items_path and results.read_items(row.items_path).gold is not None for row in before)
    assert Path("study/report.html").is_file()
