"""Speed and memory of the pools: the eager reference, torch.compile of it, and mlpool, with parity beside every speed.

    python benchmarks/throughput.py --quick            minutes on two CPU cores
    python benchmarks/throughput.py                    every size of the design, on the GPU where there is one
    python benchmarks/throughput.py --preset qwen2-0.5b
    python benchmarks/throughput.py --choices          every exact choice of the plan, against the one that it picks

Prints tables and adds their rows to a CSV in benchmarks/results/ as they are measured. A row whose error is out of
bounds shows the error and no speed, and the exit status is 1; the rest is measured all the same. What the columns mean:

    extra MiB   peak above weights, weight gradients and inputs; in evaluation the folded weights and folding them are
                counted
    x floor     time over that of our plan's FLOP at the rate of a large matrix product, measured in the same run
    error       relative, of the embedding and, behind |, of the gradient closest to its bound

With --choices a row is one entry of the plan (keys, values, launches, feed_forward, mix, memory) changed from what the
plan picks, and the regret of a case is the time of the pick over that of the best. Where memory is chosen otherwise the
row is left out of that: it is picked by what fits.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import ALL, CASES, EVAL, PRESETS, STEP, Case, Preset, alternatives, choices_of
from measure import (
    Clock,
    Row,
    Skipped,
    add_run_arguments,
    copy_rate,
    device_slug,
    extra_memory,
    facts,
    free_memory,
    is_lost,
    number,
    product_rate,
    progress,
    quantiles,
    rounds,
    start,
    table,
    touch,
)  # fmt: skip
from mlpool_kernels import Plan, Sizes
from mlpool_kernels.runtime import use_triton
from rows import Rows, run_cases
from torch import nn
from work import Forward, Parity, Work, build_pool, needed_bytes

HEADER = ["", "median ms", "20-80 %", "texts/s", "FLOP/s", "extra MiB", "vs eager", "vs compiled", "x floor"]
HEADER += ["error", "target"]
# Share of the free memory that an estimate may fill.
FILL = 0.85
# A quick run times no choice that is predicted to take this many times as long as the pick.
HOPELESS = 4
# The bandwidth of an H200 in the design's table of floors.
H200_BANDWIDTH = 4.3e12


class Bench:
    """Measures case after case on one device and collects the rows."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quick: bool, compiled: bool) -> None:
        self.device, self.dtype, self.quick, self.compiled = device, dtype, quick, compiled
        self.clock = Clock(device)
        gpu = device.type == "cuda"
        self.budget, self.most = (0.5, 100) if gpu else (2.5 if quick else 8.0, 50)
        # The reference is measured once where one call takes this long.
        self.slow = 5.0 if quick else 10.0
        progress("rate of a matrix product")
        self.facts = facts(device)
        self.product, self.copy = product_rate(device, dtype), copy_rate(device)
        self.notes: list[str] = []
        busy = self.facts["load"] or 0.0
        if device.type == "cpu" and busy > 0.6:
            self.notes.append(
                f"load {busy:.1f} before the start: others use the cores, so no time here is to be trusted"
            )
            progress(f"{self.notes[-1]}; --threads 1 suffers least")
        self.pool: nn.Module | None = None
        self.preset_name = ""

    def title(self) -> str:
        f = self.facts
        return (
            f"{f['device']}, {f['threads']} threads, {str(self.dtype)[6:]}, torch {f['torch']}, triton {f['triton']}, "
            f"mlpool {f['mlpool']} ({f['commit']}); product {number(self.product / 1e9)} GFLOP/s, "
            f"copy {number(self.copy / 1e9)} GB/s"
        )

    def note(self, case: Case, text: str) -> None:
        line = f"{case.preset} B={case.batch} {case.mode}: {text}"
        self.notes.append(line)
        progress(line)

    # --- one case ------------------------------------------------------------------------------------------------

    def measure(self, case: Case, choices: bool = False) -> list[Row]:
        """The rows of a case; with `choices` its providers are the pick of the plan and what differs from it.

        Raises: Skipped where it does not fit the machine.
        """
        preset = PRESETS[case.preset]
        batch = self._load(case, preset)
        if choices:
            case = replace(case, providers=self._choices(case, batch))
        work = Work(case, preset, batch, self.pool, self.device, self.dtype)
        progress(f"{case.preset} B={batch} {case.mode}: reference on {len(work.texts)} texts")
        work.settle()
        forwards, parities = self._check(work)
        work.true_gradients = {}
        group = self._time(work, forwards, parities)
        if choices:
            self._regret(work, group)
        print(f"\n{self._heading(work)}\n{table(HEADER, map(cells, group))}", flush=True)
        return group

    def _choices(self, case: Case, batch: int) -> tuple[str, ...]:
        pool, training = self.pool, case.mode != EVAL
        assert pool is not None
        pool.choices = {}
        keys = pool._plan_keys(case.tokens)
        sizes = Sizes(
            batch, keys, pool.hidden_size, pool.num_latents, pool.num_heads, pool.head_dim,
            pool.ff_mult * pool.hidden_size,
        )  # fmt: skip
        plan = pool.plan(batch, case.tokens, training=training).plan
        others = alternatives(
            sizes, plan, training=training, triton=use_triton(pool.backend, pool.latents),
            masked=pool.layer_weights is None and keys != 1,
        )  # fmt: skip
        names = ["mlpool", *(f"mlpool {' '.join(f'{k}={v}' for k, v in other.items())}" for other in others)]
        return tuple(name for name in names if not (self.quick and self._hopeless(case, batch, name)))

    def _hopeless(self, case: Case, batch: int, name: str) -> bool:
        """Whether a quick run leaves a choice out, as it is predicted to take many times as long as the pick."""
        pool, training = self.pool, case.mode != EVAL
        times = []
        for choices in ({}, choices_of(name)):
            pool.choices = choices
            times.append(sum(pool.plan(batch, case.tokens, training=training).seconds))
        if times[1] <= HOPELESS * times[0]:
            return False
        self.note(case, f"{name} left out of the quick run: predicted {times[1] / times[0]:.0f}x the pick's time")
        return True

    def _regret(self, work: Work, group: list[Row]) -> None:
        """Which row the plan picked, which was the best, and what the pick costs above it."""
        timed = [row for row in group if "median_ms" in row]
        picked = next((row for row in timed if row["provider"] == "mlpool"), None)
        if picked is None:
            return
        memory = Plan.parse(picked["plan"]).memory
        rivals = [row for row in timed if Plan.parse(row["plan"]).memory == memory]
        best = min(rivals, key=lambda row: row["median_ms"])
        for row in timed:
            row |= {"picked": row is picked, "best": row is best, "regret": row["median_ms"] / best["median_ms"]}
            row["target"] = "picked" if row is picked else ""
            row["target"] += f"{', ' if row is picked else ''}best" if row is best else ""

    def _load(self, case: Case, preset: Preset) -> int:
        """Have the preset's pool, and how many texts fit."""
        if self.preset_name != case.preset:
            self.pool, self.preset_name = None, case.preset
            blank = build_pool(preset, "meta", self.dtype)
            weights = sum(p.numel() for p in blank.parameters()) * self.dtype.itemsize if blank is not None else 0
            free = free_memory(self.device)
            if weights > FILL * free:
                self.preset_name = ""
                raise Skipped(f"the weights take {weights >> 20:,} MiB and {free >> 20:,} are free")
            progress(f"{case.preset}: {weights >> 20:,} MiB of weights")
            torch.manual_seed(0)
            self.pool = build_pool(preset, self.device, self.dtype)
        if self.pool is not None:
            self.pool.train()  # drops folded weights
            for p in self.pool.parameters():
                p.grad = None
        count = 0 if self.pool is None else sum(p.numel() for p in self.pool.parameters())
        free, batch = free_memory(self.device), case.batch
        while batch and needed_bytes(case, preset, batch, count, self.dtype.itemsize) > FILL * free:
            batch //= 2
        if not batch:
            raise Skipped(f"not even one text is estimated to fit the {free >> 20:,} MiB that are free")
        if batch < case.batch:
            self.note(case, f"B={batch}, as the reference at B={case.batch} is estimated not to fit {free >> 20:,} MiB")
        return batch

    def _check(self, work: Work) -> tuple[dict[str, Forward], dict[str, Parity]]:
        """Each provider's forward and its errors; a provider that cannot run is left out with a line."""
        forwards, parities = {}, {}
        for provider in work.case.providers:
            if provider == "compiled" and not self.compiled:
                continue
            progress(f"{work.case.preset} B={work.batch} {work.case.mode}: parity of {provider}")
            forward = work.forward(provider)
            try:
                # In float32 eager is the reference, or is checked against float64 by the tests.
                known = provider == "eager" and work.low is None
                parities[provider] = Parity(0.0, 0.0) if known else work.parity(provider, forward)
            except Exception as error:
                if is_lost(self.device) or not (forwards or provider == "compiled"):
                    raise
                if provider != "compiled" and not isinstance(error, torch.cuda.OutOfMemoryError):
                    # Of no known error: as wrong as a row can be, and the others go on.
                    traceback.print_exc()
                    forwards[provider], parities[provider] = forward, Parity(float("nan"), 0.0)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                self.note(work.case, f"{provider} left out: {reason}")
                continue
            forwards[provider] = forward
            if not parities[provider].green:
                self.note(work.case, f"{provider} IS WRONG: {parities[provider]}")
        return forwards, parities

    def _time(self, work: Work, forwards: dict[str, Forward], parities: dict[str, Parity]) -> list[Row]:
        calls = {name: work.call(forward) for name, forward in forwards.items() if parities[name].green}
        extra, samples, due = {}, {}, {}
        for name, call in calls.items():
            progress(f"{work.case.preset} B={work.batch} {work.case.mode}: memory of {name}")
            # Once for what only a first call allocates; on a CPU the check has done it.
            if self.device.type == "cuda":
                work.prepare()
                call()
            work.prepare_memory(name)
            if name == "eager":
                count = sum(p.numel() for p in work.parameters.values())
                touch(needed_bytes(work.case, work.preset, work.batch, count, self.dtype.itemsize), self.device)
            peak, seconds = extra_memory(call, self.device)
            extra[name] = None if peak is None else max(0, peak - work.gradient_bytes)
            if seconds > self.slow and name == "eager":
                samples[name] = [seconds]
            else:
                due[name] = (work.prepare, call)
        progress(f"{work.case.preset} B={work.batch} {work.case.mode}: time")
        # Beside what it is compared with: on a shared machine the rate changes.
        self.product, self.copy = product_rate(self.device, self.dtype), copy_rate(self.device)
        samples |= rounds(due, self.clock, self.budget, self.most, work.case.latency)
        work.prepare()
        return [self._row(work, name, parities, samples, extra) for name in forwards]

    # --- rows ----------------------------------------------------------------------------------------------------

    def _row(self, work: Work, name: str, parities: dict[str, Parity], samples: Any, extra: Any) -> Row:
        case, pool, parity = work.case, self.pool, parities[name]
        flops, floor_flops, plan, predicted = work.cost(name)
        row: Row = {
            "case": named(case), "preset": case.preset, "mode": case.mode,
            "provider": name, "batch": work.batch, "tokens": case.tokens, "layers": work.preset.layers,
            "hidden": work.preset.hidden, "latents": getattr(pool, "num_latents", None),
            "heads": getattr(pool, "num_heads", None), "head_dim": getattr(pool, "head_dim", None),
            "width": pool.ff_mult * pool.hidden_size if pool is not None else None, "dtype": str(self.dtype)[6:],
            "plan": plan, "predicted_ms": predicted, "error": parity.error, "limit": parity.limit,
            "gradient_error": parity.gradient, "gradient_limit": parity.gradient_limit, "green": parity.green,
        }  # fmt: skip
        if name in samples:
            low, median, high = quantiles(samples[name])
            rate, unit = (self.product, "flops_per_s") if pool is not None else (self.copy, "bytes_per_s")
            row |= {
                "runs": len(samples[name]), "p20_ms": low * 1e3, "median_ms": median * 1e3, "p80_ms": high * 1e3,
                "texts_per_s": work.batch / median, unit: flops / median,
                "extra_mib": None if extra[name] is None else extra[name] / 2**20,
                "floor_ms": floor_flops / rate * 1e3, "ratio_floor": median / (floor_flops / rate),
            }  # fmt: skip
            for other in ("eager", "compiled"):
                if other in samples:
                    row[f"ratio_{other}"] = quantiles(samples[other])[1] / median
            if extra.get("eager") and extra[name] is not None:
                row["memory_share"] = extra[name] / extra["eager"]
        row["target"], row["target_met"] = target(case.targets.get(name, {}), row)
        if pool is None and self.device.type == "cuda" and "bytes_per_s" in row:
            row["target"] = f"{row['bytes_per_s'] / H200_BANDWIDTH:.0%} of 4.3 TB/s"
        return row

    def _heading(self, work: Work) -> str:
        case, pool, preset = work.case, self.pool, work.preset
        tokens = "" if case.tokens is None else f" T={case.tokens}"
        sizes = f"B={work.batch}{tokens} L={preset.layers} D={preset.hidden}"
        if pool is not None:
            sizes += f" R={pool.num_latents} H={pool.num_heads} d={pool.head_dim} F={pool.ff_mult * pool.hidden_size}"
        return f"{case.preset}  {case.mode}  {sizes}"


def named(case: Case) -> str:
    return f"{case.preset} B={case.batch} {case.mode}"


def target(wanted: Any, row: Row) -> tuple[str, bool | None]:
    """The design's targets for a row beside whether they are met."""
    if not wanted or "median_ms" not in row:
        return "", None
    keys = {"eager": "ratio_eager", "compiled": "ratio_compiled", "floor": "ratio_floor", "memory": "memory_share"}
    texts, met = [], []
    for what, bound in wanted.items():
        value, at_most = row.get(keys[what]), what in ("floor", "memory")
        if value is not None:
            met.append(value <= bound if at_most else value >= bound)
            texts.append(f"{'<=' if at_most else '>='} {bound:g}x {what} {'met' if met[-1] else 'MISSED'}")
    return ", ".join(texts), all(met) if met else None


def shown(p: Parity) -> str:
    if p.limit == 0.0:
        return "reference"
    return f"{p.error:.0e}" + ("" if p.gradient is None else f" | {p.gradient:.0e}")


def cells(row: Row) -> list[str]:
    parity = Parity(row["error"], row["limit"], row["gradient_error"], row["gradient_limit"])
    if "median_ms" not in row:
        return [row["provider"], *["-"] * 8, shown(parity), "WRONG"]
    rate = row.get("flops_per_s") or row["bytes_per_s"]
    unit = "" if "flops_per_s" in row else "B/s"
    spread = f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row["runs"] > 1 else "1 run"

    def times(key: str) -> str:
        return f"{number(row[key])}x" if key in row else "-"

    return [
        row["provider"], number(row["median_ms"]), spread, number(row["texts_per_s"]),
        (f"{number(rate / 1e12)} T" if rate >= 1e12 else f"{number(rate / 1e9)} G") + unit,
        "n/a" if row["extra_mib"] is None else number(row["extra_mib"]), times("ratio_eager"), times("ratio_compiled"),
        times("ratio_floor"), shown(parity), row["target"],
    ]  # fmt: skip


REGRET_HEADER = ["preset", "B", "mode", "picked", "best", "picked ms", "predicted ms", "picked / best"]


def regrets(rows: Rows) -> list[list[str]]:
    """Of every case what the plan picked, and what was the best."""
    lines = []
    for row in (row for row in rows.all if row.get("picked")):
        (best,) = rows.of(**{name: row.get(name) for name in KEY}, best=True)
        lines.append([
            row["preset"], str(row["batch"]), row["mode"], row["plan"], best["plan"], number(row["median_ms"]),
            number(row["predicted_ms"]), f"{row['regret']:.2f}",
        ])  # fmt: skip
    return lines


# The columns that name a case, see `main`.
KEY = ("case", "preset", "mode", "tokens", "dtype", "compiled")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, few repetitions")
    parser.add_argument("--choices", action="store_true", help="the plan's choices in place of the providers")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only this one; may be repeated")
    parser.add_argument("--mode", action="append", help=f"only this one of {EVAL}, forward+backward, {STEP}")
    parser.add_argument("--no-compile", action="store_true", help=f"leave out {ALL[1]}")
    add_run_arguments(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    device = start(args)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    name = f"{'choices' if args.choices else 'throughput'}-{device_slug(device)}-{'quick' if args.quick else 'full'}"
    section = ("choices-quick" if args.quick else "choices") if args.choices else ("quick" if args.quick else "full")
    bench = Bench(device, dtype, args.quick, not args.no_compile)
    print(bench.title(), flush=True)
    rows = Rows(args.results / f"{name}.csv", bench.facts, args.again)
    todo = [
        (
            {
                "case": named(case), "preset": case.preset, "mode": case.mode, "tokens": case.tokens,
                "dtype": str(dtype)[6:], "compiled": bench.compiled,
            },
            partial(bench.measure, case, args.choices),
        )
        for case in CASES[device.type, section]
        if (not args.preset or case.preset in args.preset) and (not args.mode or case.mode in args.mode)
    ]  # fmt: skip
    status = run_cases(todo, rows, device, args.minutes)
    for line in bench.notes:
        print(f"note: {line}")
    if args.choices:
        print(f"\n{table(REGRET_HEADER, regrets(rows))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
