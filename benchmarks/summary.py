"""The CSV files in benchmarks/results/ as Markdown.

python benchmarks/summary.py [file.csv ...] > summary.md
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from measure import RESULTS, number

HEADER = ["case", "provider", "batch", "median ms", "texts/s", "vs eager", "vs compiled", "vs sdpa", "vs ST", "x floor"]
HEADER += ["extra MiB", "error", "target"]
PATTERNS = ("throughput-*.csv", "attention-*.csv", "encode-*.csv", "train-step-*.csv", "tune-*.csv")


def main(paths: list[Path]) -> int:
    paths = paths or [path for pattern in PATTERNS for path in sorted(RESULTS.glob(pattern))]
    if not paths:
        print("no CSV files in benchmarks/results/: run benchmarks/throughput.py first", file=sys.stderr)
        return 2
    print("# Benchmarks\n")
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            print("\n".join(tiles(path, rows) if path.name.startswith("tune-") else section(path, rows)), end="\n\n")
    return 0


def section(path: Path, rows: list[dict[str, str]]) -> list[str]:
    first = rows[0]
    wrong = sum(row["green"] == "False" for row in rows)
    goals = [row["target_met"] for row in rows if row.get("target_met")]
    versions = (
        f"{first['device']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}, "
        f"triton {first['triton']}, mlpool {first['mlpool']} ({first['commit']})."
    )
    met = f"Targets met in {goals.count('True')} of the {len(goals)} rows that have one" if goals else "No targets here"
    verdict = f"{met}; {wrong or 'no'} row(s) out of bounds."
    columns = [column for column in zip(HEADER, *map(cells, rows), strict=True) if any(column[1:])]
    header, *lines = map(list, zip(*columns, strict=True))
    return [f"## {path.stem}", "", versions, verdict, "", *markdown(header, lines)]


def cells(row: dict[str, str]) -> list[str]:
    def value(name: str, unit: str = "") -> str:
        return number(float(row[name])) + unit if row.get(name) else ""

    # A bound of zero marks the reference itself.
    known = row.get("limit") == "0"
    error = (
        "reference"
        if known
        else " / ".join(f"{float(row[name]):.0e}" for name in ("error", "gradient_error") if row.get(name))
    )
    return [
        row["case"], row["provider"], row["batch"] if row.get("mode") == "train step" else "", value("median_ms"),
        value("texts_per_s"), value("ratio_eager", "x"), value("ratio_compiled", "x"), value("ratio_sdpa", "x"),
        value("ratio_st", "x"), value("ratio_floor", "x"), value("extra_mib"), error,
        "WRONG, no speed" if row["green"] == "False" else row.get("target", ""),
    ]  # fmt: skip


def tiles(path: Path, rows: list[dict[str, str]]) -> list[str]:
    fields = ["kernel", "sizes", "tile", "median_us", "error", "chosen"]
    lines = [[row.get(name) or "" for name in fields] for row in rows]
    return [f"## {path.stem}", "", f"{rows[0]['device']}, {rows[0]['dtype']}", "", *markdown(fields, lines)]


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return [line(header), line(["-" * w for w in widths]), *map(line, lines)]


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
