"""Files of texts in every format, a model whose embeddings are known, and what a whole folder holds."""

import argparse
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from fake import DIMENSION, Fake, embedding_of, embeddings_of  # noqa: E402, F401

from mlpool.corpus import command  # noqa: E402
from mlpool.corpus.embedding_folder import load_embeddings  # noqa: E402
from mlpool.corpus.encode import encode_files  # noqa: E402

# What line and record readers stumble over: separators that are no line ends, quotes, commas, a non-ASCII first line.
TRICKY = ["ünïcode first", "form\x0cfeed", "line\u2028separator", "next\x85line", 'a "quoted", comma', " spaces ", "🙂"]


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


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)
