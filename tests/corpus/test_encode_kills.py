"""Encoding that is killed, goes on, and is shared by processes: the folder is whole, and the same as without."""

import importlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch

pa = pytest.importorskip("pyarrow")
from many_texts import (  # noqa: E402
    Fake,
    assert_whole,
    data_of,
    encode,
    parsed,
    some_texts,
    write_jsonl,
)

from mlpool.corpus import command  # noqa: E402
from mlpool.corpus.embedding_folder import EmbeddingFolder, load_embeddings  # noqa: E402

encoding = importlib.import_module("mlpool.corpus.encode")


# --- kills ------------------------------------------------------------------------------------------------------------


FORK = multiprocessing.get_context("fork")  # a child without the seconds of importing everything again


def start(target: Callable, *arguments, rank: int = 0, world: int = 1, **options):
    def child() -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        target(*arguments, **options)

    process = FORK.Process(target=child)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_kill_and_resume(tmp_path):
    """Killed in the middle of a shard: the complete shards are kept, the others made, all as without the kill."""
    texts = some_texts(100)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    encode(path, tmp_path / "whole")
    out = tmp_path / "out"
    process = start(encode, path, out, Fake(delay=0.02))
    wait_for(lambda: len(list(out.glob("progress/shard-*.json"))) >= 3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = len(EmbeddingFolder(out).shards())
    assert 3 <= done < 10
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match=f"unfinished, {done} shards are complete"):
        load_embeddings(out)
    model = Fake()
    encode(path, out, model)
    assert sum(model._calls) == 100 - 10 * done
    assert data_of(out) == data_of(tmp_path / "whole")
    assert_whole(out, texts)


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_killed_again_and_again(tmp_path, format):
    """At moments that fall into checking, encoding, writing and finishing alike."""
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(120), key=[f"k{i}" for i in range(120)])
    encode(path, tmp_path / "whole", format=format, id_column="key", shard_size=4)
    moments = random.Random(1)
    for _ in range(12):
        process = start(encode, path, tmp_path / "out", Fake(0.001), format=format, id_column="key", shard_size=4)
        process.join(moments.uniform(0.01, 0.15))
        process.kill()
        process.join()
    encode(path, tmp_path / "out", format=format, id_column="key", shard_size=4)
    assert data_of(tmp_path / "out") == data_of(tmp_path / "whole")
    assert not (tmp_path / "out/progress").exists()


def test_a_cut_or_lost_shard_is_made_again(tmp_path):
    texts = some_texts(40)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    encode(path, tmp_path / "out")
    (tmp_path / "out/shard-00001.npy").unlink()
    whole = (tmp_path / "out/shard-00003.npy").read_bytes()
    (tmp_path / "out/shard-00003.npy").write_bytes(whole[:-1])
    model = Fake()
    encode(path, tmp_path / "out", model)
    assert model._calls == [10, 10]
    assert_whole(tmp_path / "out", texts)
    encode(path, tmp_path / "out", model)  # complete: nothing to do
    assert model._calls == [10, 10]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_drop_the_shard_at_hand(tmp_path, monkeypatch, number):
    texts = some_texts(100)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out"
    monkeypatch.setattr("mlpool.embedder.loading.open_model", lambda *_, **__: Fake(delay=0.02))
    args = parsed(str(path), "-o", str(out), "-m", "fake", "--shard-size", "10")

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        log = os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        import sys

        sys.stderr = os.fdopen(log, "w", buffering=1)
        os._exit(command.run(args) or 0)

    process = start(interrupted)
    wait_for(lambda: len(list(out.glob("progress/shard-*.json"))) >= 2)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130
    done = len(EmbeddingFolder(out).shards())
    assert f"interrupted; {done} shards are complete, the same command goes on" in (tmp_path / "stderr").read_text()
    assert not list(out.glob("progress/*.tmp"))
    encode(path, out)
    assert_whole(out, texts)


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_ranks(tmp_path):
    texts = some_texts(95)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    encode(path, tmp_path / "one")
    ranks = [start(encode, path, tmp_path / "two", rank=rank, world=2) for rank in range(2)]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert data_of(tmp_path / "one") == data_of(tmp_path / "two")
    assert_whole(tmp_path / "two", texts)


def test_resume_with_another_world_size(tmp_path, monkeypatch):
    """Rank 1 of 3 alone, then rank 0 of 2, then the rest by one process: each text is encoded once."""
    texts = some_texts(95)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    shards = set(range(10))
    for rank, world in ((1, 3), (0, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        model = Fake()
        own = shards & set(range(rank, 10, world))
        manifest = encode(path, tmp_path / "out", model)
        shards -= own
        assert sum(model._calls) == sum(5 if i == 9 else 10 for i in own)
        assert (manifest is None) == bool(shards)
    assert_whole(tmp_path / "out", texts)


def test_more_ranks_than_shards(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(15))
    ranks = [start(encode, path, tmp_path / "out", Fake(0.002), rank=rank, world=5) for rank in range(5)]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert_whole(tmp_path / "out", some_texts(15))


def test_the_same_run_twice_at_once(tmp_path):
    """One of two failed without a reason: its progress folder was removed under it. Now it is told who is at work."""
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(100))
    out = tmp_path / "out"
    first = start(encode, path, out, Fake(0.05))
    wait_for((out / "progress/holder.json").is_file)
    told = rf"out is being written by process {first.pid} on .+ since 20.+; wait for it, stop it, or name another"
    for overwrite in (False, True):
        with pytest.raises(BlockingIOError, match=told):
            encode(path, out, overwrite=overwrite)
    first.join()
    assert first.exitcode == 0
    assert_whole(out, some_texts(100))


def test_a_dead_holder_is_taken_over(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(100))
    out = tmp_path / "out"
    first = start(encode, path, out, Fake(0.05))
    wait_for((out / "progress/holder.json").is_file)
    first.kill()
    first.join()
    assert (out / "progress/holder.json").is_file()
    encode(path, out)
    assert_whole(out, some_texts(100))


def test_ranks_of_one_job_share_and_another_job_is_refused(tmp_path, monkeypatch):
    path, out = write_jsonl(tmp_path / "in.jsonl", some_texts(100)), tmp_path / "out"
    monkeypatch.setenv("MASTER_PORT", "1")
    ranks = [start(encode, path, out, Fake(0.03), rank=0, world=2)]
    wait_for((out / "progress/holder.json").is_file)
    ranks.append(start(encode, path, out, Fake(0.03), rank=1, world=2))
    monkeypatch.setenv("MASTER_PORT", "2")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BlockingIOError, match=f"is being written by process {ranks[0].pid} on"):
        encode(path, out)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert_whole(out, some_texts(100))


def test_ranks_and_devices(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2 and WORLD_SIZE=2"):
        encode(path, tmp_path / "out")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="overwrite would delete under the hands of 2 processes"):
        encode(path, tmp_path / "out", overwrite=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [encoding.own_device(d, 2) for d in (None, "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert encoding.own_device(None, 1) is None
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK=2, but 2 GPUs"):
        encoding.own_device(None, 4)
