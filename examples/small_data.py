"""A small copy of a data folder in its own shape, so that a comparison on a real base fits two CPU cores.

    python examples/small_data.py ../shared/data -o small

Rows are drawn by a seed, not the first of each file: many sets are sorted by their source, and the first rows of STS16
are its hardest. A classifier's training rows are of every label. Of a retrieval set, queries are drawn with their
relevant documents, and others up to as many documents as are asked for. Training pairs are copied whole.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import Counter
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    if not path.is_file():
        raise SystemExit(f"no data at {path}; pass a folder with pairs/, sts/ and retrieval/ of JSONL files")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw(rows: list, most: int) -> list:
    """`most` of the rows, the same at every call, in their order."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


def draw_each(rows: list[dict], most: int, each: int = 8) -> list[dict]:
    """As `draw`, but at least `each` rows of every label, as many as mteb's classifiers learn from."""
    first, others, seen = [], [], Counter()
    for i in random.Random(0).sample(range(len(rows)), len(rows)):
        seen[rows[i]["label"]] += 1
        (first if seen[rows[i]["label"]] <= each else others).append(i)
    return [rows[i] for i in sorted(first + others[: max(0, most - len(first))])]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def small_retrieval(folder: Path, output: Path, queries: int, documents: int) -> None:
    head, *lines = (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()
    asked = draw(read(folder / "queries.jsonl"), queries)
    names = {query["_id"] for query in asked}
    relevant = [line for line in lines if line.split("\t")[0] in names]
    found = {line.split("\t")[1] for line in relevant}
    corpus = read(folder / "corpus.jsonl")
    others = draw([d["_id"] for d in corpus if d["_id"] not in found], max(0, documents - len(found)))
    kept = found | set(others)
    write(output / "queries.jsonl", asked)
    write(output / "corpus.jsonl", [document for document in corpus if document["_id"] in kept])
    (output / "qrels.tsv").write_text("\n".join([head, *relevant]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400, help="of each STS file, and of each classification file")
    parser.add_argument("--queries", type=int, default=150, help="of each retrieval set")
    parser.add_argument("--documents", type=int, default=400, help="of each retrieval set")
    args = parser.parse_args()
    for path in sorted(args.data.glob("sts/*/*.jsonl")) + sorted(args.data.glob("classification/*/*.jsonl")):
        some = draw_each if path.parts[-3] == "classification" and path.name == "train.jsonl" else draw
        write(args.output / path.relative_to(args.data), some(read(path), args.rows))
    for folder in sorted(args.data.glob("retrieval/*/")):
        small_retrieval(folder, args.output / folder.relative_to(args.data), args.queries, args.documents)
    for path in sorted(args.data.glob("pairs/*/train.jsonl")):
        (args.output / path.relative_to(args.data)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, args.output / path.relative_to(args.data))


if __name__ == "__main__":
    main()
