"""`encode --ray` on two nodes of a cluster on this machine: whatever is killed, the shards are a single process's.

Run by `make test-ray`, in an environment of its own. The long run, by hand:

    MLPOOL_RAY_TEXTS=100000 MLPOOL_RAY_KILLS=10 make test-ray
"""

import contextlib
import os
import random
import signal
import time

import numpy as np
import pytest
import tiny
from faulty import Broken, Dies, Slow, Waits
from many_texts import Fake, data_of, embeddings_of, parsed, some_texts, write_jsonl, write_parquet
from nodes import Disturbance, complete
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from mlpool.corpus import cluster as crew
from mlpool.corpus import command
from mlpool.corpus.embedding_folder import EmbeddingFolder, load_embeddings, load_ids
from mlpool.corpus.encode import encode_files
from mlpool.remote import RemotePath

pytestmark = pytest.mark.ray
TEXTS, KILLS = int(os.environ.get("MLPOOL_RAY_TEXTS", 5000)), int(os.environ.get("MLPOOL_RAY_KILLS", 3))
# On a node with this module no process can import mlpool, wherever it lies.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "mlpool":
            raise ModuleNotFoundError("No module named 'mlpool'", name=name)

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(crew, "_POLL", 0.1)
    monkeypatch.setattr(crew, "_LOOK", 0.5)


def encode(nodes, inputs, output, model=None, **options):
    return encode_files(model or Fake(), inputs, output, ray=nodes.address, **{"progress": False, **options})


def test_actors_are_killed(nodes, tmp_path):
    """Nothing is lost or doubled; begun by a process, gone on with by the cluster, mended by a process."""
    chance = random.Random(0)
    texts = [f"text {i} " + "word " * chance.randrange(12) for i in range(TEXTS)]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    size = -(-TEXTS // 50)
    model = tiny.embedder("multi-layer-bidirectional")
    encode_files(model, path, tmp_path / "one", shard_size=size, progress=False)
    out = tmp_path / "out"
    hook = model.register_forward_hook(lambda *_: interrupt(complete(out) >= 2))
    with pytest.raises(KeyboardInterrupt):
        encode_files(model, path, out, shard_size=size, progress=False)
    hook.remove()
    first = (out / "shard-00000.npy").stat().st_mtime_ns

    def kill() -> bool:
        time.sleep(chance.uniform(0, 0.1))
        if actors := nodes.actors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(actors), signal.SIGKILL)
                return True
        return False

    with Disturbance(out, sorted(chance.sample(range(3, 45), KILLS)), kill) as kills:
        manifest = encode(nodes, path, out, model, shard_size=size)
    assert kills.count == KILLS
    assert data_of(out) == data_of(tmp_path / "one")
    assert {entry.name for entry in out.iterdir()} == {*data_of(out), "manifest.json"}
    assert (manifest["totals"]["rows"], len(manifest["shards"])) == (TEXTS, 50)
    assert (out / "shard-00000.npy").stat().st_mtime_ns == first  # what was there was kept
    (out / "shard-00007.npy").unlink()
    encode_files(model, path, out, shard_size=size, progress=False)
    assert data_of(out) == data_of(tmp_path / "one")


def interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


def test_a_node_is_lost_and_another_joins(nodes, tmp_path, monkeypatch):
    """For good; its shards go to the other node, and to one that was not there before, for which the second half of the
    texts waits. Files elsewhere, checked by all nodes."""
    texts = some_texts(400)
    write_jsonl(tmp_path / "a.jsonl", texts[:250], key=[f"d{i}" for i in range(250)])
    write_parquet(tmp_path / "b.parquet", texts[250:], key=[f"d{i}" for i in range(250, 400)])
    store = RemotePath(SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "")
    options = {"id_column": "key", "text_column": "text", "format": "parquet", "shard_size": 8}
    lost = nodes.nodes.pop()

    def lose() -> bool:
        if not nodes.actors(lost):
            return False
        nodes.remove(lost)
        return True

    # Of the process that starts a node, which only its main thread may set.
    monkeypatch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)

    def join() -> bool:
        nodes.nodes.append(nodes.add())
        return True

    (gate := tmp_path / "gate").touch()

    def works() -> bool:
        if not nodes.actors(nodes.nodes[-1], "make"):
            return False
        gate.unlink()
        return True

    with Disturbance(tmp_path / "out", [3] * 3, lose, join, works) as steps:
        encode(nodes, store / "[ab].*", store / "out", Waits(200, gate), **options)
    assert steps.count == 3
    assert np.array_equal(load_embeddings(store / "out", concatenate=True), embeddings_of(texts))
    assert load_ids(store / "out") == [f"d{i}" for i in range(400)]
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {*data_of(tmp_path / "out"), "manifest.json"}


def test_the_command(nodes, tmp_path, monkeypatch, capsys):
    """As it is typed, with a model from a folder; one actor, and the bar ends at all texts."""
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(50))
    tiny.embedder("mean-causal").save(tmp_path / "model")
    arguments = [str(path), "-m", str(tmp_path / "model"), "--shard-size", "20", "-o"]
    command.run(parsed(*arguments, str(tmp_path / "one"), "--device", "cpu"))
    monkeypatch.chdir(tmp_path)
    command.run(parsed(*arguments, "out", "--ray", nodes.address, "--actors", "1"))
    shown = capsys.readouterr()
    assert "out: 50 texts in 3 shards, dimension 32" in shown.out
    assert "encode: 100%" in shown.err
    assert data_of(tmp_path / "out") == data_of(tmp_path / "one")


def test_bad_input(nodes, tmp_path):
    """What a shard raises comes as it would here; another run's folder is refused; what always dies is given up."""
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(40))
    with pytest.raises(ValueError, match=r"in\.jsonl:5: its embedding is NaN or infinity, and 1 of 10 in this block"):
        encode(nodes, path, tmp_path / "nan", Broken(), shard_size=10)
    assert not data_of(tmp_path / "nan")
    held = EmbeddingFolder(tmp_path / "held")
    with held.held(), pytest.raises(BlockingIOError, match="is being written by process"):
        encode(nodes, path, held.path, shard_size=10)


def test_what_always_dies_is_given_up(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "_DEATHS", 1)
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(40))
    with pytest.raises(RuntimeError, match="2 actors died one after the other without completing a shard; the"):
        encode(nodes, path, tmp_path / "out", Dies(), shard_size=10, actors=1)


def test_a_node_without_the_package(nodes, tmp_path):
    (tmp_path / "refuse").mkdir()
    (tmp_path / "refuse/sitecustomize.py").write_text(REFUSE)
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(40))
    bare = nodes.add(str(tmp_path / "refuse"))
    try:
        with pytest.raises(ModuleNotFoundError, match=r"cannot import mlpool; install there .*'mlpool\[ray\]'"):
            encode(nodes, path, tmp_path / "out", Slow(0.5), shard_size=5)
    finally:
        nodes.remove(bare)
