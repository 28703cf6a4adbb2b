"""Texts from and embeddings to a filesystem that is not this machine's: the same shards, and one run at a time."""

import gzip
import json
import os
import pickle
import time

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
from many_texts import Fake, data_of, embeddings_of, encode, some_texts, write_csv, write_jsonl, write_parquet  # noqa: E402
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem  # noqa: E402

from mlpool.corpus import hold  # noqa: E402
from mlpool.corpus.embedding_folder import load_embeddings, load_ids  # noqa: E402
from mlpool.corpus.text_files import find_files  # noqa: E402
from mlpool.remote import RemotePath, to_path  # noqa: E402


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder that is reached through pyarrow alone."""
    monkeypatch.setattr(hold, "_PATIENCE", 0.02)
    (tmp_path / "store").mkdir()
    return RemotePath(SubTreeFileSystem(str(tmp_path / "store"), LocalFileSystem()), "")


def test_names():
    assert to_path("a/b.txt").name == "b.txt"
    assert str(to_path("file:///tmp/a.txt")) == "/tmp/a.txt"
    path = to_path("s3://key:secret@bucket/folder/a.jsonl.gz?region=eu-west-1&endpoint_override=localhost:1")
    assert str(path) == "s3://bucket/folder/a.jsonl.gz"  # this is written down: no secrets
    assert (path.name, path.suffixes, path.parent.name) == ("a.jsonl.gz", [".jsonl", ".gz"], "folder")
    assert pickle.loads(pickle.dumps(path)) == path
    with pytest.raises(ValueError, match=r"nope://bucket/a names no filesystem that pyarrow reaches here .* expected"):
        to_path("nope://user:secret@bucket/a?x=1")


def test_patterns(store, tmp_path):
    for name in ("b.txt", "a.txt", "a.csv", "deep/er/c.txt"):
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_text("x\n")
    assert [path.key for path in find_files(store / "*.txt")] == ["a.txt", "b.txt"]
    assert [path.key for path in find_files(store / "**/*.txt")] == ["a.txt", "b.txt", "deep/er/c.txt"]
    for pattern, names in {"[ac].txt": "a", "[!a].txt": "b", "?.txt": "ab", "[^a].txt": "a"}.items():
        found = [path.key for path in (store / pattern).matches()]
        assert found == [f"{name}.txt" for name in names], pattern
    assert [path.key for path in find_files([store / "deep/*/c.txt", store / "a.txt"])] == ["deep/er/c.txt", "a.txt"]
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern '.*/\*\.json'"):
        find_files(store / "*.json")
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        find_files(store / "none.txt")


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_there_and_back(store, tmp_path, format):
    """Several formats in, either format out: the bytes are those of local files."""
    texts = some_texts(44)
    place = tmp_path / "store"
    write_jsonl(place / "a.jsonl.gz", texts[:11], id=[f"d{i}" for i in range(11)])
    write_csv(place / "b.csv", texts[11:30])
    write_parquet(place / "c.parquet", texts[30:], id=[f"p{i}" for i in range(14)])
    options = {"id_column": "id", "text_column": "text", "format": format, "shard_size": 8}
    encode([place / name for name in ("a.jsonl.gz", "b.csv", "c.parquet")], tmp_path / "local", **options)
    manifest = encode(store / "*", store / "out", **options)
    assert data_of(place / "out") == data_of(tmp_path / "local")
    local = json.loads((tmp_path / "local/manifest.json").read_text())
    for ours, theirs in zip(manifest["shards"], local["shards"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert np.array_equal(load_embeddings(store / "out", concatenate=True), embeddings_of(texts))
    assert load_ids(store / "out") == load_ids(tmp_path / "local")
    assert {path.name for path in (place / "out").iterdir()} == {*data_of(tmp_path / "local"), "manifest.json"}
    model = Fake()
    assert encode(store / "*", store / "out", model, **options)["totals"]["rows"] == 44
    assert not model._calls  # complete


def test_a_fault_leaves_no_file_and_the_run_goes_on(store, tmp_path):
    texts = some_texts(40)
    write_jsonl(tmp_path / "store/a.jsonl", texts)

    class Fails(Fake):
        def encode(self, batch, **options):
            if len(self._calls) == 2:
                raise KeyboardInterrupt
            return super().encode(batch, **options)

    with pytest.raises(KeyboardInterrupt):
        encode(store / "a.jsonl", store / "out", Fails())
    out = tmp_path / "store/out"
    assert set(data_of(out)) == {"shard-00000.npy", "shard-00001.npy"}
    assert not [path for path in out.rglob("*") if ".new" in path.name]
    (out / "shard-00001.npy").write_bytes(b"cut")
    model = Fake()
    encode(store / "a.jsonl", store / "out", model)
    assert model._calls == [10, 10, 10]
    assert np.array_equal(load_embeddings(store / "out", concatenate=True), embeddings_of(texts))


def test_one_run_at_a_time(store, tmp_path, monkeypatch):
    """The other is told who is at work; what a dead one held is free when it has been silent for long enough."""
    write_jsonl(tmp_path / "store/a.jsonl", some_texts(30))
    notes = store / "out" / "progress"
    notes.mkdir()
    with hold.held(store / "out", notes), pytest.raises(BlockingIOError) as told:
        encode(store / "a.jsonl", store / "out")
    assert f"is being written by process {os.getpid()} on" in str(told.value)
    assert "a killed one holds it for 90 seconds more" in str(told.value)
    (notes / "holder.json").write_bytes(b'{"pid": 1, "host": "gone", "token": "t"}')
    monkeypatch.setattr(hold, "_DEAD", 0.05)
    time.sleep(0.1)
    encode(store / "a.jsonl", store / "out")
    assert len(load_embeddings(store / "out")) == 3


def test_a_hold_is_renewed_and_its_loss_seen(store, tmp_path, monkeypatch):
    monkeypatch.setattr(hold, "_BEAT", 0.02)
    notes = store / "progress"
    notes.mkdir()
    with hold.held(store, notes) as token:
        before = (notes / "holder.json").stat().st_mtime_ns
        time.sleep(0.2)
        assert (notes / "holder.json").stat().st_mtime_ns > before
        assert hold.holds(notes, token)
    assert not hold.holds(notes, token)
    write_jsonl(tmp_path / "store/a.jsonl", some_texts(30))

    class Robbed(Fake):
        def encode(self, batch, **options):
            (store / "out/progress/holder.json").write_bytes(b'{"token": "of another"}')
            return super().encode(batch, **options)

    with pytest.raises(BlockingIOError, match="is no longer this run's: it has ended, or another one has taken it"):
        encode(store / "a.jsonl", store / "out", Robbed())
    assert not data_of(tmp_path / "store/out")


def test_damaged_gzip(store, tmp_path):
    (tmp_path / "store/a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is a damaged gzip file"):
        encode(store / "a.txt.gz", store / "out")
