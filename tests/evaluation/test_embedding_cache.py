"""Corpora are embedded once: by content, by several processes, for every prompt policy."""

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mteb", reason="needs mteb: pip install 'mlpool[eval]'")

from made import Calls

from mlpool.evaluation.encoder import EmbeddingCache, Prompts
from mlpool.evaluation.evaluate import evaluate_local

pytest_plugins = ["evaluation_fixtures"]


def numbers(texts: list[str]) -> np.ndarray:
    """An embedding that says which text it is of."""
    return np.array([[float(text), 1.0] for text in texts], np.float32)


def test_cache_by_content(tmp_path):
    """Each text once, in order, over shards; another prompt or model shares nothing; a new object reads it."""
    asked: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return numbers(texts)

    cache = EmbeddingCache(tmp_path, "model", rows=8)
    texts = [str(i) for i in random.Random(0).choices(range(50), k=200)]
    np.testing.assert_array_equal(cache.get(texts, None, encode), numbers(texts))
    assert sorted(asked) == sorted(set(texts))
    more = [str(i) for i in range(70)]
    again = EmbeddingCache(tmp_path, "model", rows=8)
    np.testing.assert_array_equal(again.get(more, None, encode), numbers(more))
    assert sorted(asked) == sorted(set(texts) | set(more))
    np.testing.assert_array_equal(cache.get(more, None, encode), numbers(more))  # sees what the other wrote
    assert len(asked) == 70
    for prompt, identity in (("", "model"), ("x", "model"), (None, "other")):
        EmbeddingCache(tmp_path, identity).get(["1", "2"], prompt, encode)
    assert len(asked) == 76
    assert isinstance(np.load(next(tmp_path.glob("model/[!.]*[!s].npy")), mmap_mode="r"), np.memmap)


def test_cache_left_by_a_kill(tmp_path):
    """A shard without its keys, or half-written files, are as if they were not there."""
    cache = EmbeddingCache(tmp_path, "model")
    cache.get(["1", "2"], None, numbers)
    (keys,) = (tmp_path / "model").glob("*.keys.npy")
    keys.rename(keys.with_name(f".{keys.name}"))
    (tmp_path / "model/.abc.1.keys.npy").write_bytes(b"half")
    texts = ["1", "2", "3"]
    np.testing.assert_array_equal(EmbeddingCache(tmp_path, "model").get(texts, None, numbers), numbers(texts))


def _fill(folder: Path, start: Any, seed: int) -> None:
    texts = [str(i) for i in range(400)]
    random.Random(seed % 2).shuffle(texts)  # two of the four write the very same shards
    cache = EmbeddingCache(folder, "model", rows=16)
    start.wait()
    for i in range(0, 400, 50):
        np.testing.assert_array_equal(cache.get(texts[i : i + 50], None, numbers), numbers(texts[i : i + 50]))


def test_cache_by_several_processes(tmp_path):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)
    workers = [fork.Process(target=_fill, args=(tmp_path, start, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    texts = [str(i) for i in range(400)]
    found = EmbeddingCache(tmp_path, "model").get(texts, None, lambda _: pytest.fail("not all were stored"))
    np.testing.assert_array_equal(found, numbers(texts))


def test_corpus_is_embedded_once(tiny, small_data, tmp_path):
    """For another prompt policy only the queries are encoded; scores are those without a cache."""
    evaluate_local(tiny, small_data, ["retrieval/made"], tmp_path, label="m", progress=False)
    calls = Calls(tiny)
    options = {"label": "m", "prompts": Prompts({"Retrieval": "drug"}), "progress": False}
    (row,) = evaluate_local(tiny, small_data, ["retrieval/made"], tmp_path, **options)
    queries = {r["text"] for r in map(json.loads, (small_data / "retrieval/made/queries.jsonl").open())}
    assert set(calls.texts) <= queries
    assert set(calls.prompts.values()) == {"drug "}
    (fresh,) = evaluate_local(tiny, small_data, ["retrieval/made"], **options)
    assert row.score == pytest.approx(fresh.score, abs=1e-5)
