"""The rows of a folder of results as Markdown: the design's targets beside what was reached, then every table.

    python benchmarks/summary.py [FOLDER]          default: benchmarks/results/; the page also becomes its summary.md
    python benchmarks/summary.py FOLDER --plots    and a plot beside each CSV file

Of each file the rows of its last run are shown, those that it took up included: rows of other code, versions or tiles
are counted and left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cases import CASES
from measure import RESULTS, Row, number, writable
from rows import parsed

HEADER = ["case", "provider", "batch", "run", "median ms", "texts/s", "vs eager", "vs compiled", "vs sdpa", "vs ST"]
HEADER += ["vs ST fp16", "x floor", "extra MiB", "error", ""]
KINDS = ("gpu-test", "throughput", "choices", "attention", "encode", "train-step", "contrast", "tune")
SAME = ("device", "threads", "code", "commit", "tiles", "torch", "triton")
REACHED = {"eager": "ratio_eager", "compiled": "ratio_compiled", "floor": "ratio_floor", "memory": "memory_share"}


def read(path: Path) -> tuple[list[Row], int]:
    """The rows of a file's last run, and how many others there are."""
    with path.open(newline="", encoding="utf8") as file:
        rows = [parsed(line) for line in csv.DictReader(file)]
    # Older files know no digest of the code; where there is one, the commit says nothing more.
    same = [name for name in SAME if not (name == "commit" and "code" in rows[-1])] if rows else []
    last = [row for row in rows if all(row.get(name) == rows[-1].get(name) for name in same)]
    return last, len(rows) - len(last)


def targets(rows: Sequence[Row]) -> list[str]:
    """What the design wants of a GPU (its page on pooling, here cases.py) beside what these rows have reached."""
    on_gpu = [row for row in rows if not row["device"].startswith("CPU")]
    lines = []
    for case in CASES["cuda", "full"]:
        for provider, wanted in case.targets.items():
            found = {"preset": case.preset, "mode": case.mode, "batch": case.batch, "provider": provider}
            row = next((r for r in on_gpu if all(r.get(name) == value for name, value in found.items())), None)
            name = f"{case.preset} B={case.batch} {case.mode}"
            lines += [[name, provider, *reached(row, what, bound)] for what, bound in wanted.items()]
    for row in on_gpu:
        if row.get("target") and "target_met" in row and row["mode"] in ("encode", "train step"):
            lines.append([row["case"], row["provider"], row["target"], "", "met" if row["target_met"] else "MISSED"])
    if not on_gpu:
        return ["No GPU has measured anything here: every target of the GPU is open."]
    return markdown(["case", "provider", "wanted", "reached", ""], lines)


def reached(row: Row | None, what: str, bound: float) -> list[str]:
    """Wanted, reached, verdict."""
    at_most = what in ("floor", "memory")
    wanted = f"{'<=' if at_most else '>='} {number(bound)}x {what}"
    if row is None or (row["green"] and REACHED[what] not in row):
        return [wanted, "", "not measured"]
    if not row["green"]:
        return [wanted, "", "WRONG, no speed"]
    value = row[REACHED[what]]
    return [wanted, f"{number(value)}x", "met" if (value <= bound if at_most else value >= bound) else "MISSED"]


def section(path: Path, rows: Sequence[Row], others: int) -> list[str]:
    first = rows[-1]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "mlpool") if name in first)
    what = f"{first['device']}, {first['threads']} threads, {versions}, commit {first['commit']}"
    lines = [f"## {path.stem}", "", what + (f", tiles {first['tiles']}." if "tiles" in first else ".")]
    if others:
        lines.append(f"{others} rows of other code, versions or tiles are not shown.")
    if path.name.startswith("gpu-test"):
        return [*lines, "", *tests(rows)]
    if path.name.startswith("tune"):
        return [*lines, "", *tuned(rows, path.parent / path.name.replace("tune-", "tiles-").replace(".csv", ".json"))]
    wrong = sum(not row["green"] for row in rows)
    goals = [row["target_met"] for row in rows if "target_met" in row]
    met = f"Targets met in {sum(goals)} of the {len(goals)} rows that have one" if goals else "No targets here"
    columns = [column for column in zip(HEADER, *map(cells, rows), strict=True) if any(column[1:])]
    header, *table = map(list, zip(*columns, strict=True))
    return [*lines, f"{met}; {wrong or 'no'} row(s) wrong.", "", *markdown(header, table)]


def cells(row: Row) -> list[str]:
    def value(name: str, unit: str = "") -> str:
        return number(row[name]) + unit if name in row else ""

    # A bound of zero marks the reference itself.
    errors = (f"{row[name]:.0e}" for name in ("error", "gradient_error") if name in row)
    error = "reference" if row.get("limit") == 0 else " / ".join(errors)
    last = "; ".join(str(row[name]) for name in ("target", "note") if row.get(name))
    return [
        str(row["case"]), str(row.get("provider", "")), str(row["batch"]) if row.get("mode") == "train step" else "",
        row.get("execution", ""), value("median_ms"), value("texts_per_s"), value("ratio_eager", "x"),
        value("ratio_compiled", "x"), value("ratio_sdpa", "x"), value("ratio_st", "x"), value("ratio_st_fp16", "x"),
        value("ratio_floor", "x"), value("extra_mib"), error,
        last if row["green"] else f"WRONG, no speed: {row.get('failed', 'out of bounds')}",
    ]  # fmt: skip


def tuned(rows: Sequence[Row], file: Path) -> list[str]:
    """Every candidate; chosen are those that the file of tiles has."""
    content = json.loads(file.read_text()) if file.is_file() else {"tiles": {}}
    chosen = {kernel: " ".join(f"{k}={v}" for k, v in tile.items()) for kernel, tile in content["tiles"].items()}
    lines = []
    for row in rows:
        verdict = row.get("failed") or ("WRONG" if not row["green"] else "")
        verdict = verdict or ("chosen" if row.get("tile") and row["tile"] == chosen.get(row["kernel"]) else "")
        time, error = (
            (number(row["median_us"]) if "median_us" in row else ""),
            f"{row['error']:.0e}" if "error" in row else "",
        )
        lines.append([row["kernel"], row["sizes"], row.get("tile", ""), time, error, verdict])
    rates = [
        f"Rates of {dtype}: {', '.join(f'{k} {v:.3g}' for k, v in r.items())}."
        for dtype, r in content.get("rates", {}).items()
    ]
    return [*rates, "", *markdown(["kernel", "sizes", "tile", "median us", "error", ""], lines)]


def tests(rows: Sequence[Row]) -> list[str]:
    counts = [f"{sum(row.get('outcome') == kind for row in rows)} {kind}" for kind in ("passed", "skipped")]
    failed = [row for row in rows if not row["green"]]
    lines = [f"{', '.join(counts)}, {len(failed)} failed, {number(sum(r.get('seconds', 0) for r in rows))} s in all."]
    return [*lines, *(f"- {row['test']}: {row['failed'][-200:]}" for row in failed)]


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return [line(header), line(["-" * w for w in widths]), *map(line, lines)]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A plot beside a file: of a training step against batch, of the others as bars."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plots needs matplotlib: pip install matplotlib")
    from plots import bars, curves

    timed = [row for row in rows if "median_ms" in row]
    if timed:
        title = f"{path.name.split('-')[0]} on {rows[-1]['device']}, {rows[-1]['dtype']}"
        (curves if path.name.startswith("train") else bars)(timed, path.with_suffix(".png"), title)


def report(folder: Path, plots: bool) -> Iterator[str]:
    """The page, line by line."""
    found = [(path, *read(path)) for kind in KINDS for path in sorted(folder.glob(f"{kind}-*.csv"))]
    found = [(path, rows, others) for path, rows, others in found if rows]
    if not found:
        raise SystemExit(f"no rows in {folder}: no benchmark has run with --results {folder} (make gpu-encode, say)")
    yield "# Benchmarks"
    yield "\n## Targets on a GPU\n"
    yield from targets(
        [row for path, rows, _ in found if not path.name.startswith(("gpu-test", "tune")) for row in rows]
    )
    for path, rows, others in found:
        yield ""
        yield from section(path, rows, others)
        if plots and not path.name.startswith(("gpu-test", "tune")):
            draw(path, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--plots", action="store_true", help="a plot beside each CSV file")
    args = parser.parse_args(argv)
    page = "\n".join(report(args.folder, args.plots)) + "\n"
    print(page, end="")
    writable(args.folder)
    (args.folder / "summary.md").write_text(page, encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
