"""A corpus in S3, by a server of its API on this machine (moto): the whole job there, killed and gone on with, and what
is said where it cannot be reached. By `make test-ray`."""

import multiprocessing
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import numpy as np
import pytest
from many_texts import Fake, data_of, embeddings_of, parsed, some_texts, write_jsonl, write_parquet

from mlpool.corpus import command, hold
from mlpool.corpus.embedding_folder import EmbeddingFolder, load_embeddings, load_ids
from mlpool.corpus.encode import encode_files
from mlpool.files import replacing
from mlpool.remote import RemotePath, to_path

pytestmark = pytest.mark.ray
SECRET = "s3cret"


class Store:
    """The server, with one bucket; `uri` names what is in it."""

    def __init__(self, log) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(600):
            assert self.process.poll() is None, "moto ended: is it installed (make test-ray)?"
            with suppress(OSError):
                self.ask("PUT", "bucket")
                return
            time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def ask(self, method: str, path: str, body: bytes | None = None) -> None:
        url = f"http://127.0.0.1:{self.port}/{path}"
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "text/plain"}, method=method)).close()

    def uri(self, key: str, bucket: str = "bucket", port: int | None = None) -> str:
        where = f"endpoint_override=127.0.0.1:{port or self.port}&scheme=http&region=us-east-1"
        return f"s3://key:{SECRET}@{bucket}/{key}?{where}"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with (tmp_path_factory.mktemp("store") / "log").open("w") as log:
        made = Store(log)
        yield made
        made.process.kill()
        made.process.wait()


def test_killed_and_gone_on_with_on_a_cluster(store, nodes, tmp_path, monkeypatch):
    """Lines and Parquet from a bucket into one. While a process is at work, and for a time after its kill, the folder
    is refused; then the cluster goes on, and the shards are those of a local run."""
    texts = some_texts(120)
    local = [
        write_jsonl(tmp_path / "a.jsonl", texts[:70], key=[f"d{i}" for i in range(70)]),
        write_parquet(tmp_path / "b.parquet", texts[70:], key=[f"d{i}" for i in range(70, 120)]),
    ]
    options = {"id_column": "key", "text_column": "text", "shard_size": 10, "progress": False}
    encode_files(Fake(), local, tmp_path / "local", **options)
    for path in local:
        (to_path(store.uri("texts")) / path.name).write_bytes(path.read_bytes())
    inputs, out = store.uri("texts/*"), to_path(store.uri("out"))

    # Not a fork: the clients of S3 are threads.
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=encode_files, args=(Fake(delay=0.05), inputs, store.uri("out")), kwargs=options)
    process.start()
    end = time.monotonic() + 120
    while not (done := len(EmbeddingFolder(out).shards())):
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.1)
    with pytest.raises(BlockingIOError, match=f"s3://bucket/out is being written by process {process.pid} on"):
        encode_files(Fake(), inputs, out, **options)
    process.kill()
    process.join()
    with pytest.raises(BlockingIOError, match="a killed one holds it for 90 seconds more"):
        encode_files(Fake(), inputs, out, ray=nodes.address, **options)
    with pytest.raises(FileNotFoundError, match="it is unfinished, "):
        load_embeddings(out)
    monkeypatch.setattr(hold, "_DEAD", 0.5)
    time.sleep(2)  # S3 counts in seconds
    assert 1 <= done < 12
    encode_files(Fake(), inputs, out, ray=nodes.address, **options)

    there = {path.name: path.read_bytes() for path in out.iterdir()}
    del there["manifest.json"]
    assert there == data_of(tmp_path / "local")
    assert np.array_equal(load_embeddings(store.uri("out"), concatenate=True), embeddings_of(texts))
    assert load_ids(store.uri("out")) == [f"d{i}" for i in range(120)]
    model = Fake()
    encode_files(model, inputs, out, **options)
    assert not model._calls  # complete


def test_the_command(store, tmp_path, capsys):
    """As it is typed; nothing that is shown or written has the secret."""
    import tiny

    write_jsonl(tmp_path / "in.jsonl", some_texts(30))
    tiny.embedder("mean-causal").save(tmp_path / "model")
    arguments = ["-m", str(tmp_path / "model"), "--shard-size", "20", "--device", "cpu", "-o"]
    command.run(parsed(str(tmp_path / "in.jsonl"), *arguments, str(tmp_path / "one")))
    text = to_path(store.uri("command/in.jsonl"))
    text.write_bytes((tmp_path / "in.jsonl").read_bytes())
    command.run(parsed(store.uri("command/*.jsonl"), *arguments, store.uri("command/out")))
    shown = capsys.readouterr()
    assert "s3://bucket/command/out: 30 texts in 2 shards" in shown.out
    out = to_path(store.uri("command/out"))
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert SECRET not in shown.out + shown.err + written["manifest.json"].decode()
    assert {name: written[name] for name in data_of(tmp_path / "one")} == data_of(tmp_path / "one")


def test_what_cannot_be_reached(store, tmp_path):
    """A missing bucket, a store that is not there, credentials that are not its own: one sentence, before any work."""
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(3))

    def refused(match, inputs=path, output=tmp_path / "out", kind=OSError):
        with pytest.raises(kind, match=match) as told:
            encode_files(Fake(), inputs, output, progress=False)
        assert SECRET not in str(told.value)

    refused(r"no file fits the pattern 's3://no/\*' \(nor a bucket s3://no\)", store.uri("*", "no"))
    refused(r"s3://no/a\.txt does not exist \(nor a bucket s3://no\)", store.uri("a.txt", "no"))
    refused(r"there is no bucket s3://no, .*\?allow_bucket_creation=true", output=store.uri("out", "no"))
    encode_files(Fake(), path, store.uri("out", "new") + "&allow_bucket_creation=true", progress=False)
    assert to_path(store.uri("out", "new")).is_dir()
    with pytest.raises(ValueError, match=r"s3://bucket/a names no filesystem .*'s3://bucket/a' due to") as told:
        to_path(f"s3://key:{SECRET}/x@bucket/a")
    assert SECRET not in str(told.value)
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        dead = S3FileSystem(
            access_key="key", secret_key=SECRET, region="us-east-1", scheme="http",
            endpoint_override=f"127.0.0.1:{taken.getsockname()[1]}",
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),  # by default it is asked for six seconds
        )  # fmt: skip
        refused("s3://bucket/out cannot be looked at .*connect to", output=RemotePath(dead, "bucket/out"))
    store.ask("POST", "moto-api/reset-auth", b"0")  # from now on who asks must be known
    try:
        refused("s3://bucket/out cannot be looked at .*ACCESS_DENIED.*see that credentials", output=store.uri("out"))
    finally:
        store.ask("POST", "moto-api/reset-auth", b"inf")


def test_more_than_a_move_takes(store, monkeypatch):
    """S3 refuses to move more than 5 GiB, which the server here does not: what it refuses is written anew."""
    from mlpool import remote

    path = to_path(store.uri("large"))
    real = path.filesystem

    class Refuses:
        type_name = real.type_name

        def __getattr__(self, name):
            return getattr(real, name)

        def move(self, *_):
            raise OSError("The specified copy source is larger than the maximum allowable size")

    path = RemotePath(Refuses(), path.key)
    with pytest.raises(OSError, match="larger than"), replacing(path) as new:
        new.write_bytes(b"four")
    assert not path.exists()
    monkeypatch.setattr(remote, "_COPIED", 3)
    with replacing(path) as new:
        new.write_bytes(b"four")
    assert path.read_bytes() == b"four"
    assert not new.exists()
