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
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from mlpool_kernels import Plan, Sizes, attend, feed_forward, mix, sums, tiles
from mlpool_kernels import rows as pool_rows
from mlpool_kernels.contrast import backward as contrast_backward
from mlpool_kernels.contrast import forward as contrast_forward
from mlpool_kernels.plan import Operation, feed_forward_operations, key_operations, value_operations
from mlpool_kernels.runtime import capability
from rows import Rows, run_cases
from torch import Tensor

from mlpool.pooling.tokens import select_tokens

gather = importlib.import_module("mlpool_kernels.gather")
embed = importlib.import_module("mlpool_kernels.embed")

# bfloat16 results against the same in float32 or wider sums.
LIMIT = 2e-2
REPEATS = 20


class Job(NamedTuple):
    """One kernel, or plain operation, at one size. reference: the same by plain torch.

    cost: FLOP and bytes as the cost model counts them, and the rate that its time tells of.
    """

    kernel: str
    sizes: str
    run: Callable[[], list[Tensor]]
    reference: Callable[[], list[Tensor]]
    cost: Operation | None = None


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

    shape, place = states[0].shape, new.device

    def select(backend: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            t = select_tokens(shape, place, mask, check=False, backend=backend)
            return [t.starts, t.ends, t.last, t.count, t.keep]

        return run

    yield Job("select", sizes, select("triton"), select("torch"))
    yield Job("mean", sizes, forward(True, "triton"), forward(True, "torch"))
    yield Job("unit_mean", sizes, forward(True, "triton", True), forward(True, "torch", True))
    yield Job("last", sizes, forward(False, "triton"), forward(False, "torch"))
    yield Job("gather_backward", sizes, backward("triton"), backward("torch"))


def attend_jobs(new: Maker, batch: int, keys: int, hidden: int, columns: int) -> Iterator[Job]:
    """Rows at one length with their mix, as the default pool reads them."""
    x0, weight, bias = new(batch, keys, hidden), 1 + 0.1 * new(hidden), 0.1 * new(hidden)
    norm = pool_rows.Norm(new(keys), new(keys, hidden), weight, bias)
    queries = new(columns, hidden, scale=hidden**-0.5)
    sizes = f"B={batch} n={keys} D={hidden} H.R={columns}"

    def one() -> list[Tensor]:
        return present(attend.attend_one_launch([x0], None, norm, queries, new.dtype)[1:])

    def plain() -> list[Tensor]:
        x, mixed = pool_rows.norm_rows(x0, norm, torch.float32)
        return present([x, mixed, (x @ queries.float().T).softmax(1)])

    cost = key_operations(Sizes(batch, keys, hidden, columns, 1, 1, 1), Plan(launches="one"), 2, cached=True)
    # From so many texts on a program holds all columns of one.
    name = "attend_text" if batch >= attend.MANY_TEXTS else "attend"
    yield Job(name, sizes, one, plain, *cost)
    grad, added = new(batch, keys, hidden), new(batch, hidden, dtype=torch.float32)

    def by_kernel() -> list[Tensor]:
        drows, parts = pool_rows.norm_rows_backward_triton(grad, x0, norm, added, summed=True)
        return [drows, *(part.sum(0) for part in present(parts))]

    def by_torch() -> list[Tensor]:
        drows, grads = pool_rows.norm_rows_backward(grad, x0, norm, added)
        return [drows, *(g.flatten() for g in present(grads))]

    yield Job(
        "norm", sizes, lambda: present(pool_rows.norm_rows_triton([x0], None, norm, new.dtype)[1:]),
        lambda: present(pool_rows.norm_rows(x0, norm, torch.float32)),
    )  # fmt: skip
    yield Job("norm_backward", sizes, by_kernel, by_torch)


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def sum_job(new: Maker, batch: int, keys: int, hidden: int) -> Job:
    """The sums of a default pool's backward."""
    widths = {"bias": (batch, 2 * hidden), "rows": (32, keys * hidden), "norm": (32 * keys, hidden)}
    parts = {name: new(*shape, dtype=torch.float32) for name, shape in widths.items()}
    return Job(
        "sum", f"B={batch} n={keys} D={hidden}", lambda: list(sums.sum_parts(parts, batch, new.dtype).values()),
        lambda: [part.sum(0) for part in parts.values()],
    )  # fmt: skip


def softmax_job(new: Maker, batch: int, keys: int, columns: int) -> Job:
    scores, grad = new(batch, keys, columns), new(batch, keys, columns)

    def both(s: Tensor, d: Tensor, triton: bool) -> list[Tensor]:
        a = attend.softmax_(s.clone(), None, triton)
        return [a, attend.softmax_backward_(a, d.clone(), triton)]

    sizes = f"B={batch} n={keys} H.R={columns}, forward and backward"
    return Job("softmax", sizes, lambda: both(scores, grad, True), lambda: both(scores.float(), grad.float(), False))


def mix_jobs(new: Maker, batch: int, keys: int, hidden: int, heads: int, latents: int) -> Iterator[Job]:
    """Of VO, and of V and Wo head by head, forward and backward; heads of 64."""
    attention = new(batch, keys, heads * latents).softmax(1)
    vo, v = new(batch * keys, heads, hidden), new(batch * keys, heads, 64)
    output_weight, z, base = (
        new(hidden, heads * 64, scale=hidden**-0.5),
        new(latents, hidden),
        new(batch, hidden).float(),
    )
    norm = (1 + 0.1 * new(hidden), 0.1 * new(hidden))
    sizes = f"B={batch} n={keys} D={hidden} H={heads} R={latents}"

    def run(values: mix.Values, triton: bool) -> list[Tensor]:
        a, out = (attention, output_weight) if triton else (attention.float(), output_weight.float())
        given = values if triton else mix.Values(*(None if t is None else t.float() for t in values))
        return list(mix.mix(a, given, out, z, *norm, base, "early", triton)[:2])

    s = Sizes(batch, keys, hidden, latents, heads, 64, 1)
    for name, form, values in (("mix", "absorbed", mix.Values(None, vo)), ("mix_heads", "early", mix.Values(v, None))):
        *_, cost = value_operations(s, Plan(values=form, mix="kernel"), 2, cached=True)
        both = (partial(run, values, triton) for triton in (True, False))
        yield Job(name, sizes, *both, cost if name == "mix_heads" else None)
    grad = new(batch, latents, heads * 64)

    def plain() -> list[Tensor]:
        a, b, d = (t.float() for t in (attention, v, grad))
        of_outputs = mix._split_heads(a, b, latents)[0] @ mix._split_heads(a, b, latents)[1]
        da, dv, _ = mix.mix_backward(d, a, mix.Values(b, None), torch.eye(heads * 64, device=new.device), "late")
        ds = attend.softmax_backward_(a, da, False)
        return [ds, dv.view_as(b), of_outputs.transpose(1, 2).flatten(2)]

    yield Job(
        "mix_backward", sizes, lambda: present(mix.mix_heads_backward(grad, attention, v, latents, None, True)), plain
    )


def feed_forward_jobs(new: Maker, batch: int, latents: int, hidden: int, width: int) -> Iterator[Job]:
    normed, weight, bias = new(batch, latents, hidden), new(2 * width, hidden, scale=hidden**-0.5), new(2 * width)

    def run(descriptors: bool) -> Callable[[], list[Tensor]]:
        return lambda: [feed_forward._feed_forward_triton(normed, weight, bias, descriptors)]

    def plain() -> list[Tensor]:
        w, b, parts = weight.float(), bias.float(), normed.float().split(4)
        return [torch.cat([feed_forward.feed_forward(n, w, b, "chunked", False, False)[0] for n in parts])]

    s, sizes = Sizes(batch, 1, hidden, latents, 1, 1, width), f"B={batch} R={latents} D={hidden} F={width}"
    cost, _ = feed_forward_operations(s, Plan(feed_forward="fused", memory="recompute"), 2)
    best = feed_forward.takes_descriptors(normed, weight)
    yield Job("feed_forward", sizes, run(False), plain, None if best else cost)
    if best:
        yield Job("feed_forward_tma", sizes, run(True), plain, cost)


def embed_job(new: Maker, batch: int, hidden: int) -> Job:
    tensors = (
        new(batch, hidden),
        new(hidden),
        new(batch, hidden, dtype=torch.float32),
        new(batch, hidden),
        new(hidden),
    )

    def run(backend: str) -> list[Tensor]:
        return [embed.embed(*tensors, True, new.dtype, backend)]

    return Job("embed", f"B={batch} D={hidden}", lambda: run("triton"), lambda: run("torch"))


def gate_job(new: Maker, batch: int, latents: int, width: int) -> Job:
    both, grad = new(batch, latents, 2 * width), new(batch, width, dtype=torch.float32)

    def run(x: Tensor, triton: bool) -> list[Tensor]:
        dboth, dbias = feed_forward.gate_backward(x, grad, triton, overwrite=False)
        return [feed_forward.gate_mean(x, triton), dboth, dbias.sum(0)]

    sizes = f"B={batch} R={latents} F={width}, forward and backward"
    # The backward reads and writes what the forward reads: three times its work.
    cost = Operation("gate", 3 * both.numel(), 0)
    return Job("gate", sizes, lambda: run(both, True), lambda: run(both.float(), False), cost)


def contrast_jobs(new: Maker, anchors: int, documents: int, hidden: int) -> Iterator[Job]:
    rows, others = new(anchors, hidden), new(documents, hidden)
    partners = torch.arange(anchors, device=new.device)

    def run(backend: str, dims: list[int]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            texts = (rows, others) if backend == "triton" else (rows.float(), others.float())
            arguments = (*texts, partners, None, None, None, dims, 0.05, backend)
            logs, positives = contrast_forward(*arguments)
            ones = torch.ones_like(logs)
            return [logs, positives, *contrast_backward(ones, -ones, logs, *arguments)]

        return both

    sizes = f"N={anchors} M={documents} D={hidden}, forward and backward"
    for name, dims in (("contrast", [hidden]), ("contrast_stages", [hidden // 4, hidden])):
        yield Job(name, sizes, run("triton", dims), run("torch", dims))


# Rows, columns and depth of products as the presets have them.
PRODUCTS = {
    "cpu": [(48, 24576, 896), (384, 4096, 896), (768, 1024, 896), (64, 4096, 4096), (16, 512, 384)],
    "cuda": [(6144, 24576, 896), (6144, 28672, 896), (2048, 65536, 4096), (24576, 32768, 4096), (4096, 1792, 896),
             (4096, 8192, 4096), (1536, 512, 896)],
}  # fmt: skip
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
LAUNCHES = 100


def rate_jobs(new: Maker) -> Iterator[Job]:
    """Plain operations: a launch, a copy, products."""
    one = new(1)

    def launches() -> list[Tensor]:
        for _ in range(LAUNCHES - 1):
            one.abs()
        return [one.abs()]

    yield Job("launch", f"{LAUNCHES} of one number", launches, lambda: [one.abs()], Operation("launch", 0, 0))
    # Into memory that is there already: on a CPU handing out new pages takes longer than filling them.
    source = new(COPY_BYTES[new.device.type] // new.dtype.itemsize)
    target, moved = torch.empty_like(source), 2 * source.numel() * source.element_size()
    cost = Operation("memory", 0, moved)
    yield Job("copy", f"{moved >> 20} MiB", lambda: [target.copy_(source)], lambda: [source], cost)
    for rows, columns, depth in PRODUCTS[new.device.type]:
        a, b = new(rows, depth), new(columns, depth)
        moved = (a.numel() + b.numel() + rows * columns) * a.element_size()
        yield Job(
            "product", f"{rows} x {columns} x {depth}", lambda a=a, b=b: [a @ b.T],
            lambda a=a, b=b: [a.float() @ b.float().T], Operation("product", 2 * rows * columns * depth, moved),
        )  # fmt: skip


def jobs(new: Maker, small: bool) -> Iterator[Job]:
    """The presets' sizes; small ones for the interpreter."""
    if small:
        yield from gather_jobs(new, 2, 7, 3, 72)
        yield from attend_jobs(new, 2, 5, 72, 40)
        yield from attend_jobs(new, attend.MANY_TEXTS, 2, 20, 10)
        yield softmax_job(new, 2, 5, 40)
        yield from mix_jobs(new, 2, 3, 72, 2, 20)
        yield sum_job(new, 3, 4, 40)
        yield from feed_forward_jobs(new, 2, 20, 72, 40)
        yield gate_job(new, 2, 20, 40)
        yield embed_job(new, 3, 72)
        yield from contrast_jobs(new, 20, 70, 24)
        return
    yield from rate_jobs(new)
    if new.device.type == "cpu":
        return
    yield from gather_jobs(new, 64, 128, 24, 896)
    yield from gather_jobs(new, 64, 256, 32, 4096)
    for layers, hidden in ((24, 896), (32, 4096)):
        yield from attend_jobs(new, 64, layers, hidden, 512)
        yield from attend_jobs(new, 256, layers, hidden, 512)
        yield softmax_job(new, 64, layers, 24576)
        yield from mix_jobs(new, 64, layers, hidden, 8, 64)
        yield sum_job(new, 64, layers, hidden)
        yield from feed_forward_jobs(new, 64, 64, hidden, hidden)
        yield embed_job(new, 64, hidden)
    yield softmax_job(new, 4, 512, 24576)
    # Not the released pool of D = 4096: there the products win by far, and a tile is not to be chosen for it.
    yield from feed_forward_jobs(new, 64, 768, 896, 3584)
    yield gate_job(new, 32, 768, 3584)
    yield gate_job(new, 16, 768, 16384)
    yield from contrast_jobs(new, 8192, 32768, 1024)


def candidates(kernel: str, device: torch.device) -> list[tiles.Tile]:
    """The tiles to try; a plain operation has one, empty."""
    if kernel not in tiles.TILES:
        return [{}]
    return tiles.candidates(kernel, capability(torch.empty(0, device=device)))


def trial(job: Job, tile: tiles.Tile, clock: Clock | None) -> Row:
    """One candidate: its error, and where that is within bounds and there is a clock its time."""
    tiles._overrides = lambda: {job.kernel: tile}  # what MLPOOL_TILES sets
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
