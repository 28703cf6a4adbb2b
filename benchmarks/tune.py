"""Time every candidate tile of every kernel on the GPU at hand, and write the best as a file for MLPOOL_TILES.

    python benchmarks/tune.py                                a table, CSV and JSON in benchmarks/results/
    MLPOOL_TILES=benchmarks/results/tiles-....json python …  uses the choice
    TRITON_INTERPRET=1 python benchmarks/tune.py --check     no GPU: every candidate once, small sizes, errors only

A tile is chosen by the geometric mean, over the sizes, of its time relative to the best; one whose result is out of
bounds or that does not fit the device is not chosen. With --check the exit status is 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measure import (
    RESULTS,
    Clock,
    Row,
    device_slug,
    facts,
    number,
    progress,
    quantiles,
    relative_error,
    table,
    write_csv,
)
from mlpool_kernels import attend, feed_forward, mix, tiles
from torch import Tensor

from mlpool.pooling.tokens import select_tokens

gather = importlib.import_module("mlpool_kernels.gather")

# bfloat16 results against the same in float32 or wider sums.
LIMIT = 2e-2
REPEATS = 20


class Job(NamedTuple):
    """One kernel at one size. reference: the same by plain torch."""

    kernel: str
    sizes: str
    run: Callable[[], list[Tensor]]
    reference: Callable[[], list[Tensor]]


class Maker:
    """Random tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return scale * torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def gather_jobs(new: Maker, batch: int, length: int, layers: int, hidden: int) -> Iterator[Job]:
    states = [new(batch, length, hidden) for _ in range(layers)]
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=new.device)
    mask = (torch.arange(length, device=new.device) < lengths).long()
    t = select_tokens(states[0].shape, new.device, mask)
    spans = (t.starts, t.ends, t.last, t.count, t.keep)
    grad = new(batch, layers, hidden)
    sizes = f"B={batch} T={length} L={layers} D={hidden}"

    def forward(mean: bool, backend: str, unit: bool = False) -> Callable[[], list[Tensor]]:
        return lambda: [gather._forward(states, *spans, mean, backend, unit)]

    def backward(backend: str) -> Callable[[], list[Tensor]]:
        return lambda: gather._backward(grad, list(states[0].shape), *spans, True, backend)

    yield Job("mean", sizes, forward(True, "triton"), forward(True, "torch"))
    yield Job("unit_mean", sizes, forward(True, "triton", True), forward(True, "torch", True))
    yield Job("last", sizes, forward(False, "triton"), forward(False, "torch"))
    yield Job("gather_backward", sizes, backward("triton"), backward("torch"))


def attend_jobs(new: Maker, batch: int, keys: int, hidden: int, columns: int) -> Iterator[Job]:
    x0, weights = new(batch, keys, hidden), new(keys, hidden)
    norm = (1 + 0.1 * new(hidden), 0.1 * new(hidden))
    queries = new(columns, hidden, scale=hidden**-0.5)
    sizes = f"B={batch} n={keys} D={hidden} H.R={columns}"

    def one(q: Tensor | None) -> Callable[[], list[Tensor]]:
        end = 2 if q is None else 3
        return lambda: list(attend.attend_one_launch([x0], None, weights, *norm, q, new.dtype)[1:end])

    def plain(q: Tensor | None) -> list[Tensor]:
        x = attend.norm_keys(x0, weights, *norm, torch.float32)
        return [x] if q is None else [x, (x @ q.float().T).softmax(1)]

    # From so many texts on a program holds all columns of one.
    yield Job("attend_text" if batch >= attend.MANY_TEXTS else "attend", sizes, one(queries), lambda: plain(queries))
    yield Job("norm", sizes, one(None), lambda: plain(None))


def softmax_job(new: Maker, batch: int, keys: int, columns: int) -> Job:
    scores, grad = new(batch, keys, columns), new(batch, keys, columns)

    def both(s: Tensor, d: Tensor, triton: bool) -> list[Tensor]:
        a = attend.softmax_(s.clone(), None, triton)
        return [a, attend.softmax_backward_(a, d.clone(), triton)]

    sizes = f"B={batch} n={keys} H.R={columns}, forward and backward"
    return Job("softmax", sizes, lambda: both(scores, grad, True), lambda: both(scores.float(), grad.float(), False))


def mix_job(new: Maker, batch: int, keys: int, hidden: int, heads: int, latents: int) -> Job:
    attention = new(batch, keys, heads * latents).softmax(1)
    vo, z = new(batch * keys, heads, hidden), new(latents, hidden)
    norm = (1 + 0.1 * new(hidden), 0.1 * new(hidden))

    def run(wide: bool) -> list[Tensor]:
        a, v = (attention.float(), vo.float()) if wide else (attention, vo)
        return list(mix.mix(a, [v, v], None, z, *norm, "early", not wide, False)[:2])

    return Job("mix", f"B={batch} n={keys} D={hidden} H={heads} R={latents}", lambda: run(False), lambda: run(True))


def feed_forward_job(new: Maker, batch: int, latents: int, hidden: int, width: int) -> Job:
    normed, weight, bias = new(batch, latents, hidden), new(2 * width, hidden, scale=hidden**-0.5), new(2 * width)

    def run() -> list[Tensor]:
        return [feed_forward.feed_forward(normed, weight, bias, "fused", True, False)[0]]

    def plain() -> list[Tensor]:
        w, b, parts = weight.float(), bias.float(), normed.float().split(4)
        return [torch.cat([feed_forward.feed_forward(n, w, b, "chunked", False, False)[0] for n in parts])]

    return Job("feed_forward", f"B={batch} R={latents} D={hidden} F={width}", run, plain)


def gate_job(new: Maker, batch: int, latents: int, width: int) -> Job:
    both, grad = new(batch, latents, 2 * width), new(batch, width, dtype=torch.float32)

    def run(x: Tensor, triton: bool) -> list[Tensor]:
        return [feed_forward.gate_mean(x, triton), *feed_forward.gate_backward(x, grad, triton, overwrite=False)]

    sizes = f"B={batch} R={latents} F={width}, forward and backward"
    return Job("gate", sizes, lambda: run(both, True), lambda: run(both.float(), False))


def jobs(new: Maker, small: bool) -> Iterator[Job]:
    """The presets' sizes; small ones for the interpreter."""
    if small:
        yield from gather_jobs(new, 2, 7, 3, 72)
        yield from attend_jobs(new, 2, 5, 72, 40)
        yield from attend_jobs(new, attend.MANY_TEXTS, 2, 20, 10)
        yield softmax_job(new, 2, 5, 40)
        yield mix_job(new, 2, 3, 72, 2, 20)
        yield feed_forward_job(new, 2, 20, 72, 40)
        yield gate_job(new, 2, 20, 40)
        return
    yield from gather_jobs(new, 64, 128, 24, 896)
    yield from gather_jobs(new, 64, 256, 32, 4096)
    for layers, hidden in ((24, 896), (32, 4096)):
        yield from attend_jobs(new, 64, layers, hidden, 512)
        yield from attend_jobs(new, 256, layers, hidden, 512)
        yield softmax_job(new, 64, layers, 24576)
        yield mix_job(new, 64, layers, hidden, 8, 64)
        yield feed_forward_job(new, 64, 64, hidden, hidden)
    yield softmax_job(new, 4, 512, 24576)
    yield feed_forward_job(new, 64, 768, 896, 3584)
    yield gate_job(new, 32, 768, 3584)
    yield gate_job(new, 16, 768, 16384)


def trial(job: Job, tile: tiles.Tile, clock: Clock | None) -> Row:
    """One candidate: its error, and where that is within bounds and there is a clock its time."""
    tiles._overrides = lambda: {job.kernel: tile}  # what MLPOOL_TILES sets
    row: Row = {"kernel": job.kernel, "sizes": job.sizes, "tile": " ".join(f"{k}={v}" for k, v in tile.items())}
    try:
        pairs = zip(job.run(), job.reference(), strict=True)
        row["error"] = max((relative_error(got, right.float()) for got, right in pairs), key=lambda e: (e != e, e))
        if clock is not None and row["error"] <= LIMIT:
            job.run()
            low, median, high = quantiles([clock(job.run) for _ in range(REPEATS)])
            row |= {"p20_us": low * 1e6, "median_us": median * 1e6, "p80_us": high * 1e6}
    except Exception as error:  # out of shared memory or registers: no candidate on this device
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return row


def choose(rows: list[Row]) -> dict[str, tiles.Tile]:
    """Per kernel the candidate with the least mean time relative to the best, among those that run at every size."""
    chosen: dict[str, tiles.Tile] = {}
    for kernel, candidates in tiles.TILES.items():
        scores = {}
        for i, _ in enumerate(candidates):
            own = [row for row in rows if row["kernel"] == kernel and row["candidate"] == i]
            if own and all("median_us" in row for row in own):
                scores[i] = sum(math.log(row["median_us"] / row["best_us"]) for row in own)
        if scores:
            chosen[kernel] = candidates[min(scores, key=scores.__getitem__)]
    return chosen


def measure(device: torch.device, small: bool) -> list[Row]:
    clock = None if small else Clock(device)
    torch.manual_seed(0)
    rows: list[Row] = []
    for job in jobs(Maker(device, torch.bfloat16), small):
        progress(f"{job.kernel} {job.sizes}")
        group = [trial(job, tile, clock) | {"candidate": i} for i, tile in enumerate(tiles.TILES[job.kernel])]
        best = min((row["median_us"] for row in group if "median_us" in row), default=None)
        rows += [row | {"best_us": best, "dtype": "bfloat16", **facts(device)} for row in group]
    return rows


def cells(row: Row) -> list[str]:
    error = f"{row['error']:.0e}" if "error" in row else "-"
    last = row.get("failed") or ("WRONG" if not row["error"] <= LIMIT else "chosen" if row.get("chosen") else "")
    return [row["kernel"], row["sizes"], row["tile"], number(row.get("median_us")), error, last]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="no times: every candidate once at small sizes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (args.check and os.environ.get("TRITON_INTERPRET") == "1"):
        print("tune.py needs a CUDA GPU; without one only TRITON_INTERPRET=1 … tune.py --check works", file=sys.stderr)
        return 2
    rows = measure(device, args.check)
    chosen = choose(rows)
    for row in rows:
        row["chosen"] = chosen.get(row["kernel"]) == tiles.TILES[row["kernel"]][row["candidate"]]
    print(table(["kernel", "sizes", "tile", "median us", "error", ""], map(cells, rows)))
    if not args.check:
        write_csv(rows, args.results / f"tune-{device_slug(device)}.csv")
        path = args.results / f"tiles-{device_slug(device)}.json"
        path.write_text(json.dumps(chosen, indent=2) + "\n")
        print(f"\nwritten: {path.name}; set MLPOOL_TILES to its path to use it")
    return int(any("error" in row and not row["error"] <= LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
