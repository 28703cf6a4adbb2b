"""Files of training pairs, as the tests of their reader write them."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PAIRS = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
WANT = {"anchor": [p["query"] for p in PAIRS], "positive": [p["positive"] for p in PAIRS]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The default cache, in this test's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write(path: Path, rows, **options) -> Path:
    """`rows` in the form that the path's extension says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", newline="") as file:
        if kind in ("jsonl", "ndjson"):
            file.writelines(json.dumps(row, **options) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines(path: Path, *texts: str) -> Path:
    path.write_bytes("\n".join(texts).encode() + b"\n")
    return path


def pair(query="q", positive="p", **more) -> str:
    return json.dumps({"query": query, "positive": positive, **more})


def ragged(*counts: int) -> list[dict]:
    return [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}.{k}" for k in range(n)]} for i, n in enumerate(counts)]


def negatives(pairs) -> list[list[str]]:
    return [[v for k, v in row.items() if k.startswith("negative")] for row in pairs]
