"""InfoNCE as one op against eager PyTorch: time, memory and error, forward and backward, by the number of texts.

    python benchmarks/contrast.py                      minutes on two CPU cores; on a GPU every size
    python benchmarks/contrast.py --full               also on a CPU up to 8,192 anchors and 16,384 documents
    python benchmarks/contrast.py --sizes 4096x16384 --dtype float32

Anchors [N, D] against documents [M, D] of random numbers, cosine / 0.05; the first N documents are the positives.

    products  the matrix products of it alone, of large blocks: one forward; with the backward four, for the scores are
              computed again (three where they are kept, as eager does)
    eager     F.normalize, one product, cross_entropy: every score at once
    mlpool    mlpool_kernels.contrast

With masks every fourth text is repeated, and scores over the positive's + 0.1 are left out; with prefixes the loss is
that of D, D/4 and D/16. The error is relative, of the loss and, behind |, of the worse gradient: to float64, on 512
anchors and 2,048 documents of the same kind, and beyond them to what blocks of eager in float32 say of the first 256
anchors' own gradient. Out of bounds shows no speed, and the exit status is 1. Memory is the peak above the texts,
gradients included. Rows go into a CSV in benchmarks/results/ as they are measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    Clock,
    Row,
    add_run_arguments,
    device_name,
    device_slug,
    facts,
    free_memory,
    number,
    peak_memory,
    progress,
    quantiles,
    relative_error,
    rounds,
    start,
    table,
    touch,
)
from mlpool_kernels.contrast import contrast
from rows import Rows, run_cases
from torch import Tensor

HEADER = ["", "median ms", "20-80 %", "TFLOP/s", "peak MiB", "vs eager", "memory", "x products", "error", "target"]
HIDDEN, TEMPERATURE, MARGIN = 1024, 0.05, 0.1
PRODUCTS, EAGER, OURS = "products", "eager", "mlpool"
MODES = ("forward", "forward+backward")
KINDS = ("plain", "masks", "prefixes")
SIZES = {
    "cpu quick": [(512, 2048), (1024, 4096)], "cpu full": [(1024, 4096), (4096, 8192), (8192, 16384)],
    "cuda": [(1024, 4096), (4096, 16384), (16384, 65536)],
}  # fmt: skip
# How often eager's own error, of the loss and of the gradients; in float32 what is always good enough.
LIMITS, LEAST = (2.0, 3.0), 1e-6
CHECKED = (512, 2048)  # anchors and documents that the errors are computed on
BLOCK = {"cpu": 1024, "cuda": 8192}
BUDGET = {"cpu": 20.0, "cuda": 1.0}
# Most time over that of the products, and least times that eager's memory is ours.
TIME, MEMORY = 1.3, 16
FILL = 0.7  # of the free memory that eager may be estimated to take


@dataclass(frozen=True)
class Case:
    anchors: int
    documents: int
    kind: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.anchors}x{self.documents} {self.kind} {self.mode}"


class Texts:
    """Anchors, documents whose first are the positives, and the options that a kind of case has."""

    def __init__(self, anchors: int, documents: int, kind: str, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.rows = torch.randn(anchors, HIDDEN, device=device)
        self.others = torch.randn(documents, HIDDEN, device=device)
        # A positive has cosine 0.29: a loss near zero would leave nothing of the gradient but rounding.
        self.others[:anchors] += 0.3 * self.rows
        self.rows, self.others = (F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (self.rows, self.others))
        self.partners = torch.arange(anchors, device=device)
        self.options: dict[str, Any] = {"temperature": TEMPERATURE}
        if kind == "masks":
            keys = torch.arange(documents, device=device)
            keys = torch.where(keys % 4 == 0, keys // 8, keys)
            other_keys = torch.stack([keys, torch.where(keys < anchors, -1 - keys, keys)], 1)
            self.options |= {"row_keys": other_keys[:anchors].flip(1), "other_keys": other_keys, "margin": MARGIN}
        if kind == "prefixes":
            self.options["dims"] = [HIDDEN // 16, HIDDEN // 4, HIDDEN]

    def to(self, dtype: torch.dtype) -> Texts:
        other = object.__new__(Texts)
        other.rows, other.others = (x.detach().to(dtype).requires_grad_() for x in (self.rows, self.others))
        other.partners, other.options = self.partners, self.options
        return other

    def call(self, loss: Callable[..., Tensor], mode: str) -> list[Tensor]:
        """The mean loss and, with backward, both gradients."""
        with torch.set_grad_enabled(mode != "forward"):
            value = loss(self.rows, self.others, self.partners, **self.options).mean()
            return [value] if mode == "forward" else [value, *torch.autograd.grad(value, [self.rows, self.others])]


def eager(
    rows: Tensor, others: Tensor, partners: Tensor, *, temperature: float, dims: Sequence[int] | None = None,
    row_keys: Tensor | None = None, other_keys: Tensor | None = None, margin: float | None = None,
) -> Tensor:  # fmt: skip
    """As a loss is written: every score at once, in the precision of the texts."""

    def cosines(d: int) -> Tensor:
        return F.normalize(rows[:, :d], dim=1) @ F.normalize(others[:, :d], dim=1).T

    hidden = None
    if row_keys is not None and other_keys is not None:
        (own, theirs), (key, companion) = row_keys.T[..., None], other_keys.T
        hidden = (key == own) | (key == theirs) | (companion == own)
        if margin is not None:
            with torch.no_grad():
                c = cosines(rows.shape[1])
                hidden |= c > c.gather(1, partners[:, None]) + margin
        hidden = hidden.scatter(1, partners[:, None], False)
    losses = []
    for d in dims or [rows.shape[1]]:
        scores = cosines(d) / temperature
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        losses.append(F.cross_entropy(scores, partners, reduction="none"))
    return torch.stack(losses)


def products(texts: Texts, mode: str) -> Callable[[], Any]:
    """The matrix products of a case alone, block by block into the same memory."""
    a, b = texts.rows.detach(), texts.others.detach()
    step = BLOCK[a.device.type]
    scores = a.new_empty(min(step, len(a)), min(step, len(b)))
    da, db = torch.empty_like(a[:step]), torch.empty_like(b[:step])

    def run() -> None:
        for x in a.split(step):
            for y in b.split(step):
                s = scores[: len(x), : len(y)]
                for _ in range(1 if mode == "forward" else 2):
                    torch.mm(x, y.T, out=s)
                if mode != "forward":
                    torch.mm(s, y, out=da[: len(x)])
                    torch.mm(s.T, x, out=db[: len(y)])

    return run


def errors(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float | None]]:
    """Of eager and ours to float64, on a part of the texts: of the loss, and with backward the worse gradient's."""
    texts = Texts(min(case.anchors, CHECKED[0]), min(case.documents, CHECKED[1]), case.kind, device, dtype)
    truth = texts.to(torch.float64).call(eager, case.mode)
    found = {}
    for name, loss in ((EAGER, eager), (OURS, contrast)):
        values = texts.call(loss, case.mode)
        each = [relative_error(x.detach(), y.detach()) for x, y in zip(values, truth, strict=True)]
        found[name] = (each[0], max(each[1:], key=lambda e: (e != e, e)) if len(each) > 1 else None)
    return found


def whole(texts: Texts, mode: str) -> list[float]:
    """Errors at full size: of the first anchors' losses and their gradients, to float32 eager of these alone."""
    few = min(256, len(texts.rows))
    part = texts.to(torch.float32)
    part.rows = part.rows.detach()[:few].requires_grad_()
    part.partners = texts.partners[:few]
    if "row_keys" in part.options:
        part.options = part.options | {"row_keys": part.options["row_keys"][:few]}
    ours = contrast(texts.rows, texts.others, texts.partners, **texts.options)
    want = eager(part.rows, part.others, part.partners, **part.options)
    found = [relative_error(ours[:, :few].detach(), want.detach())]
    if mode != "forward":
        (mine,) = torch.autograd.grad(ours.mean(), texts.rows)
        (right,) = torch.autograd.grad(want.sum() / ours.numel(), part.rows)
        found.append(relative_error(mine[:few].float(), right))
    return found


def eager_bytes(case: Case, itemsize: int) -> int:
    """About what eager holds at once: products, scores, softmax and its gradient, for every prefix that is kept."""
    return (2 + 2 * (3 if case.kind == "prefixes" else 1)) * case.anchors * case.documents * itemsize


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device = start(args)
        self.kind = self.device.type
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if self.kind == "cuda" else "float32"))
        self.full = args.full or self.kind == "cuda"
        self.clock = Clock(self.device)
        name = f"contrast-{device_slug(self.device)}-{'full' if self.full else 'quick'}.csv"
        self.rows = Rows(args.results / name, facts(self.device), args.again)

    def sizes(self) -> list[tuple[int, int]]:
        return SIZES["cuda" if self.kind == "cuda" else f"cpu {'full' if self.full else 'quick'}"]

    def measure(self, case: Case, key: Row) -> list[Row]:
        progress(f"{case.name}: parity")
        found = errors(case, self.device, self.dtype)
        least = LEAST if self.dtype == torch.float32 else 0.0
        limits = [max(least, times * (error or 0.0)) for times, error in zip(LIMITS, found[EAGER], strict=True)]
        texts = Texts(case.anchors, case.documents, case.kind, self.device, self.dtype)
        at_size = whole(texts, case.mode)
        # Beside eager in float32 of the same numbers, whose own rounding is of this size.
        bound = 1e-5 if self.dtype == torch.float32 else 4 * torch.finfo(self.dtype).eps
        green = {
            name: all(e is None or e <= limit for e, limit in zip(pair, limits, strict=True))
            for name, pair in found.items()
        } | {EAGER: True}
        green[OURS] &= all(e <= bound for e in at_size)
        runs: dict[str, Callable[[], Any]] = {PRODUCTS: products(texts, case.mode)}
        runs |= {name: partial(texts.call, loss, case.mode) for name, loss in ((EAGER, eager), (OURS, contrast))}
        extra, why = self._memory(case, runs, green)
        progress(f"{case.name}: time")
        due = {name: (lambda: None, runs[name]) for name in (PRODUCTS, *extra)}
        for _, run in due.values():
            if self.kind == "cuda":
                run()
        samples = rounds(due, self.clock, BUDGET[self.kind], 20, latency=False)
        rows = [self._row(case, key, name, samples, extra) for name in runs]
        for row in rows:
            name = row["provider"]
            error = found.get(name, (None, None))
            row |= {
                "error": error[0], "limit": limits[0] if error[0] is not None else None, "gradient_error": error[1],
                "gradient_limit": limits[1] if error[1] is not None else None, "green": green.get(name, True),
                "note": why.get(name, ""),
            }  # fmt: skip
            if name == OURS:
                row |= dict(zip(("whole_error", "whole_gradient_error"), at_size, strict=False))
                row |= self._targets(row)
        print(f"\n{case.name}, D={HIDDEN}\n{table(HEADER, map(cells, rows))}", flush=True)
        return rows

    def _memory(
        self, case: Case, runs: dict[str, Callable[[], Any]], green: dict[str, bool]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Peak memory of each provider that fits, and why another does not."""
        extra, why = {}, {}
        for name in (EAGER, OURS):
            if not green[name]:
                continue
            need, free = eager_bytes(case, self.dtype.itemsize), free_memory(self.device)
            if name == EAGER and need > FILL * free:
                why[name] = f"estimated to take {need >> 20:,} MiB, and {free >> 20:,} are free"
                continue
            progress(f"{case.name}: memory of {name}")
            if name == EAGER:
                touch(need, self.device)
            try:
                extra[name], _ = peak_memory(runs[name], self.device)
            except torch.OutOfMemoryError:
                why[name] = "out of memory"
        return extra, why

    def _row(self, case: Case, key: Row, name: str, samples: dict[str, list[float]], extra: dict[str, int]) -> Row:
        row: Row = key | {
            "preset": f"D={HIDDEN}", "mode": case.mode, "kind": case.kind, "anchors": case.anchors,
            "documents": case.documents, "provider": name,
        }  # fmt: skip
        if name not in samples:
            return row
        low, median, high = quantiles(samples[name])
        flops = 2 * case.anchors * case.documents * HIDDEN * (1 if case.mode == "forward" else 4)
        row |= {
            "runs": len(samples[name]), "p20_ms": low * 1e3, "median_ms": median * 1e3, "p80_ms": high * 1e3,
            "flops_per_s": flops / median, "ratio_products": median / quantiles(samples[PRODUCTS])[1],
        }  # fmt: skip
        if EAGER in samples and name != PRODUCTS:
            row["ratio_eager"] = quantiles(samples[EAGER])[1] / median
        if name in extra:
            row["extra_mib"] = extra[name] / 2**20
            if EAGER in extra:
                row["memory_share"] = extra[name] / extra[EAGER]
        return row

    def _targets(self, row: Row) -> Row:
        """Of the plain loss at large sizes, time; memory where eager ran beside it, gradients left out of ours."""
        if row["kind"] != "plain" or "median_ms" not in row or row["anchors"] < 8192:
            return {}
        met, texts = row["ratio_products"] <= TIME, [f"<= {TIME}x products"]
        if "memory_share" in row:
            texts.append(f"<= 1/{MEMORY} of eager's memory")
            met &= row["memory_share"] <= 1 / MEMORY
        return {"target": f"{', '.join(texts)}: {'met' if met else 'MISSED'}", "target_met": met}


def cells(row: Row) -> list[str]:
    error = "" if row.get("error") is None else f"{row['error']:.0e}"
    error += "" if row.get("gradient_error") is None else f" | {row['gradient_error']:.0e}"
    if "median_ms" not in row:
        return [row["provider"], *["-"] * 7, error, row["note"] if row["green"] else "WRONG"]

    def times(name: str) -> str:
        return f"{number(row[name])}x" if name in row else "-"

    spread = f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row["runs"] > 1 else "1 run"
    return [
        row["provider"], number(row["median_ms"]), spread, number(row["flops_per_s"] / 1e12),
        number(row.get("extra_mib")), times("ratio_eager"), times("memory_share"), times("ratio_products"), error,
        row.get("target", ""),
    ]  # fmt: skip


def size(text: str) -> tuple[int, int]:
    anchors, _, documents = text.partition("x")
    try:
        found = int(anchors), int(documents)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 4096x16384") from None
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text}: at least one anchor, and as many documents as anchors")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="larger sizes also on a CPU")
    parser.add_argument("--sizes", action="append", type=size, help="anchors x documents: only these")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    bench = Bench(args)
    print(
        f"{device_name(bench.device)}, {torch.get_num_threads()} threads, {str(bench.dtype)[6:]}, D={HIDDEN}",
        flush=True,
    )
    todo = []
    for anchors, documents in args.sizes or bench.sizes():
        for kind in args.kind or KINDS:
            for mode in args.mode or MODES:
                case = Case(anchors, documents, kind, mode)
                key = {"case": case.name, "dtype": str(bench.dtype)[6:]}
                todo.append((key, partial(bench.measure, case, key)))
    return run_cases(todo, bench.rows, bench.device, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
