"""Time every candidate tile of every kernel on the device at hand, fit the cost model's rates, write both to a file.

    python benchmarks/tune.py                                a table, CSV and JSON in benchmarks/results/
    MLPOOL_TILES=benchmarks/results/tiles-....json python …  uses the choice; with the same --results a benchmark does
    TRITON_INTERPRET=1 python benchmarks/tune.py --check     no GPU: every candidate once, small sizes, errors only

A tile is chosen by the geometric mean, over the sizes, of its time relative to the best; one whose result is out of
bounds or that does not fit the device is not chosen. A rate is the geometric mean, over the sizes, of what is left of
the time after the launch (`mlpool_kernels.plan`): of the kernels at their chosen tiles, and of plain products. A CPU,
where no kernel runs, has rates alone.

The exit status is 1 where a result is wrong, a candidate fails by anything but the device's limits, or a kernel has no
candidate left; the others are measured all the same. An error that the GPU does not recover from ends the run; tiles
and rates then are those of what was measured before it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import (
    Clock,
    Row,
    add_run_arguments,
    device_slug,
    facts,
    is_lost,
    number,
    progress,
    quantiles,
    relative_error,
    start,
    table,
    tiles_file,
)
from mlpool_kernels import tiles
from mlpool_kernels.runtime import capability
from rows import Rows, run_cases
from tune_jobs import LAUNCHES, Job, Maker, jobs

# bfloat16 results against the same in float32 or wider sums.
LIMIT = 2e-2
REPEATS = 20


def candidates(kernel: str, device: torch.device) -> list[tiles.Tile]:
    """The tiles to try; a plain operation has one, empty."""
    if kernel not in tiles.TILES:
        return [{}]
    return tiles.candidates(kernel, capability(torch.empty(0, device=device)))


def trial(job: Job, tile: tiles.Tile, clock: Clock | None) -> Row:
    """One candidate: its error, and where that is within bounds and there is a clock its time."""
    named, tiles._overrides = tiles._overrides, lambda: {job.kernel: tile}  # what MLPOOL_TILES sets
    row: Row = {"kernel": job.kernel, "sizes": job.sizes, "tile": shown(tile), "green": True}
    try:
        pairs = zip(job.run(), job.reference(), strict=True)
        row["error"] = max((relative_error(got, right.float()) for got, right in pairs), key=lambda e: (e != e, e))
        row["green"] = row["error"] <= LIMIT
        if clock is not None and row["green"]:
            job.run()
            low, median, high = quantiles([clock(job.run, latency=job.kernel == "launch") for _ in range(REPEATS)])
            row |= {"p20_us": low * 1e6, "median_us": median * 1e6, "p80_us": high * 1e6}
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        # Out of shared memory, registers or memory: no candidate on this device. Anything else is a fault.
        row["green"] = type(error).__name__ in ("OutOfResources", "OutOfMemoryError")
    finally:
        tiles._overrides = named
    return row


def shown(tile: tiles.Tile) -> str:
    return " ".join(f"{field}={value}" for field, value in tile.items())


def choose(rows: list[Row]) -> dict[str, tiles.Tile]:
    """Per kernel the candidate with the least mean time relative to the best, among those that run at every size."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if "median_us" in row:
            key = row["kernel"], row["sizes"]
            best[key] = min(row["median_us"], best.get(key, math.inf))
    chosen: dict[str, tiles.Tile] = {}
    for kernel, known in tiles.TILES.items():
        scores = {}
        for i, tile in enumerate(known):
            own = [row for row in rows if row["kernel"] == kernel and row.get("tile") == shown(tile)]
            if own and all("median_us" in row for row in own):
                scores[i] = sum(math.log(row["median_us"] / best[kernel, row["sizes"]]) for row in own)
        if scores:
            chosen[kernel] = known[min(scores, key=scores.__getitem__)]
    return chosen


def empty(rows: list[Row]) -> list[str]:
    """Kernels and operations that no candidate computed at some size."""
    good = {row["case"] for row in rows if row["green"] and "failed" not in row}
    return list(dict.fromkeys(row["case"] for row in rows if row["case"] not in good))


def fit(rows: list[Row], kernels: bool) -> dict[str, float] | None:
    """The rates of the measured dtype, from the chosen tiles' rows; None where one is missing. kernels: do they run?"""
    timed = [r for r in rows if "unit" in r and "median_us" in r and r.get("chosen", True)]
    by_unit = {unit: [r for r in timed if r["unit"] == unit] for unit in tiles.RATE_FIELDS}
    if not all(by_unit[unit] for unit in (tiles.RATE_FIELDS if kernels else ("launch", "memory", "product"))):
        return None
    launch = min(r["median_us"] for r in by_unit["launch"]) / LAUNCHES / 1e6

    def mean_rate(unit: str, amount: str) -> float:
        logs = []
        for row in by_unit[unit]:
            seconds = row["median_us"] / 1e6
            # Where a launch explains nearly all of it, what is left is noise: a half at least is the unit's.
            logs.append(math.log(row[amount] / max(seconds - launch, seconds / 2)))
        return math.exp(sum(logs) / len(logs))

    memory = mean_rate("memory", "bytes")
    rates = {"launch": launch, "memory": memory, "product": mean_rate("product", "flops")}
    for unit in ("attend", "mix", "feed_forward"):
        # Where no kernel runs its rate decides nothing.
        rates[unit] = mean_rate(unit, "flops") if by_unit[unit] else rates["product"]
    rates["gate"] = mean_rate("gate", "flops") if by_unit["gate"] else memory / 4
    return {unit: float(f"{rates[unit]:.4g}") for unit in tiles.RATE_FIELDS}


def cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[tuple[Row, Callable[[], list[Row]]]]:
    """What names a job, and what measures all its candidates."""
    clock = None if small else Clock(device)
    torch.manual_seed(0)
    for job in jobs(Maker(device, dtype), small):
        key = {"case": f"{job.kernel} {job.sizes}", "kernel": job.kernel, "sizes": job.sizes, "dtype": str(dtype)[6:]}
        yield key, partial(measure, job, device, clock)


def measure(job: Job, device: torch.device, clock: Clock | None) -> list[Row]:
    """A row for every candidate.

    Raises: RuntimeError where a candidate's error is one that the GPU does not recover from.
    """
    progress(f"{job.kernel} {job.sizes}")
    cost = {} if job.cost is None else job.cost._asdict()
    rows: list[Row] = []
    for tile in candidates(job.kernel, device):
        rows.append(trial(job, tile, clock) | cost)
        if "failed" in rows[-1] and is_lost(device):
            raise RuntimeError(f"{rows[-1]['tile']}: {rows[-1]['failed']}")
    return rows


def cells(row: Row) -> list[str]:
    error = f"{row['error']:.0e}" if "error" in row else "-"
    last = row.get("failed") or ("chosen" if row.get("chosen") else "" if row["green"] else "WRONG")
    return [row["kernel"], row["sizes"], row.get("tile", ""), number(row.get("median_us")), error, last]


def write_tuned(path: Path, chosen: dict[str, tiles.Tile], rates: dict[str, dict[str, float]]) -> None:
    """Whole or not at all, and only what `tiles` reads again."""
    content = {"device": tiles.device_here(), **tiles.versions_here(), "tiles": chosen, "rates": rates}
    tiles.read_tuned(content, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".new").replace(path)


def finish(rows: list[Row], device: torch.device, dtype: torch.dtype, folder: Path) -> None:
    """Choose, fit, and write the file of tiles and rates."""
    chosen = choose(rows)
    for row in rows:
        if row["kernel"] in tiles.TILES:
            row["chosen"] = row.get("tile") == shown(chosen.get(row["kernel"], {}))
    rates = fit(rows, kernels=device.type == "cuda")
    if rates is not None:
        fitted = ", ".join(f"{name} {value:.3g}" for name, value in rates.items())
        print(f"\nrates of {dtype}: {fitted} (FLOP/s, bytes/s, seconds)")
    else:
        print("\nNO RATES: an operation or kernel that they need was not measured; the cost model keeps its defaults")
    path = tiles_file(folder, device)
    write_tuned(path, chosen, {} if rates is None else {str(dtype)[6:]: rates})
    print(f"written: {path.name}; set MLPOOL_TILES to its path to use it")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="no times: every candidate once at small sizes")
    add_run_arguments(parser)
    args = parser.parse_args(arguments)
    device = start(args, tuned=False)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and args.check != interpreted:
        print("without a GPU: TRITON_INTERPRET=1 tune.py --check, or tune.py alone for the rates", file=sys.stderr)
        return 2
    dtype = torch.float32 if device.type == "cpu" and not args.check else torch.bfloat16
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.check else args.results
        table_file = Rows(folder / f"tune-{device_slug(device)}.csv", facts(device), args.again)
        status = run_cases(cases(device, dtype, args.check), table_file, device, args.minutes)
        rows = table_file.all
    if not args.check:
        finish(rows, device, dtype, args.results)
    print(table(["kernel", "sizes", "tile", "median us", "error", ""], map(cells, rows)))
    without = empty(rows)
    for name in without:
        print(f"NO CANDIDATE LEFT: {name}")
    return 1 if without else status


if __name__ == "__main__":
    sys.exit(main())
