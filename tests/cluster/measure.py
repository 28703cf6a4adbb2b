"""What handing out over a cluster costs, on nodes of one core each on this machine.

    .venv-ray/bin/python tests/cluster/measure.py [--texts 20000]

A model that only takes its time needs no core: one process, one actor and two nodes are compared by the clock wherever
this runs. "encode" is from the first shard on; "all" has the check of the texts and the start of the actors, too.
Before that: what a driver does alone, by seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)] + [
    str(Path(__file__).resolve().parents[1] / "corpus")
]

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from faulty import Slow  # noqa: E402
from nodes import Nodes  # noqa: E402

from mlpool.corpus.embedding_folder import EmbeddingFolder  # noqa: E402
from mlpool.corpus.encode import encode_files  # noqa: E402
from mlpool.corpus.shards import Shard  # noqa: E402
from mlpool.corpus.text_files import check_files, find_columns, read_ranges  # noqa: E402

SECONDS = 0.002  # a text, of the model that only takes its time


def timed(path: Path, out: Path, size: int, **options: Any) -> tuple[float, float]:
    """Seconds from the first shard to the end, a shard added; and of the whole call."""
    began = time.monotonic()
    totals = encode_files(Slow(SECONDS), path, out, shard_size=size, progress=False, **options)["totals"]
    whole = time.monotonic() - began
    made = sorted(file.stat().st_mtime for file in out.glob("shard-*.npy"))
    return (made[-1] - made[0]) * totals["shards"] / max(1, totals["shards"] - 1), whole


def driver(root: Path, rows: int) -> None:
    chance = random.Random(0)
    texts = [" ".join("word" * chance.randrange(1, 3) for _ in range(chance.randrange(10, 90))) for _ in range(rows)]
    lines, table = root / "texts.jsonl", root / "texts.parquet"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), table, row_group_size=10_000)
    for path in (lines, table):
        columns = find_columns([path])
        began = time.process_time()
        files = check_files([path], columns)
        checked = time.process_time() - began
        began = time.process_time()
        next(read_ranges(files, columns, [(rows - 1, rows)]))
        skipped = time.process_time() - began
        print(f"{path.suffix}: checked {rows / checked:,.0f} texts/s, skipped {rows / skipped:,.0f} texts/s")
    folder = EmbeddingFolder(root / "folder")
    folder.path.mkdir()
    (folder.path / "shard-00000.npy").write_bytes(b"x")
    for i in range(1000):
        folder.record(i, Shard("shard-00000.npy", None, 0, 1, 1, True, 1, 0.0, 0, 0, "0" * 64))
    began = time.process_time()
    folder.shards()
    print(f"records: {1000 / (time.process_time() - began):,.0f} shards/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlpool-cluster-") as name:
        root = Path(name)
        driver(root, 100_000)
        path = root / "in.jsonl"
        path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(args.texts)))
        size = -(-args.texts // 100)
        nodes = Nodes()
        try:
            ways = {
                "one process": {},
                "one actor": {"ray": nodes.address, "actors": 1},
                "two nodes": {"ray": nodes.address},
            }
            for way, options in ways.items():
                encode, whole = timed(path, root / way, size, **options)
                print(f"{way:12} encode {encode:6.1f} s, all {whole:6.1f} s", flush=True)
        finally:
            nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
