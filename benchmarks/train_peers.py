"""Fine-tuning beside sentence-transformers: the same LoRA from the same start over the same texts, in turns.

    python benchmarks/train_peers.py --base bases/smollm2      both bases, 13 minutes on two quiet CPU cores
    python benchmarks/train_peers.py --base bases/smollm2 --quick
    python benchmarks/train_peers.py --preset qwen2-0.5b --lengths 24 --steps 2

A step is InfoNCE (temperature 0.05) over pairs, its backward pass and AdamW on LoRA of rank 16 and, where there is one,
the pool; the texts are tokenized before. Attention is bidirectional. train_step.py compares batches and memory instead.

    sentence-transformers         mean pooling, MultipleNegativesRankingLoss
    sentence-transformers cached  the same under CachedMultipleNegativesRankingLoss
    mlpool mean                   the same embedding by InfoNCE as it is by default: activations kept where they fit
    mlpool mean cached            InfoNCE that keeps one mini-batch, as the cached peer; of as many tokens
    eager                         the paper's pipeline over mlpool's default pool, MultipleNegativesRankingLoss
    mlpool                        the default pool, InfoNCE as it is by default

Every round is one step of each, each from its own weights, so that what else the machine does meets them all. Texts of
24 tokens, and real pairs of up to 256, every source of pairs/ in a mix: a base of random weights gets random words in
those lengths. All run with a C library that keeps what a step frees: glibc gives it back to the system and takes it
again, a page fault each time, up to a tenth of a step, and of whom depends on who ran before.

    wall, cpu   medians of a step: the clock's, and the processor's time of all threads, which others' work hardly moves
    peak MiB    of tensors above the weights: gradients, activations, workspace
    vs plain, vs cached   times as fast as sentence-transformers' one and other loss; by the clock, or by the processor
                where others had the cores meanwhile. The last line of a case says which, and how many its steps had
    errors      of the loss at the first step and, behind |, the largest of any step: relative, to the first provider of
                the same embedding. Out of bounds (1e-4, 2e-2) shows no speed, and the exit status is 1

The rows of a case, minutes of work, go into a CSV in benchmarks/results/ as soon as it is measured, with every step's
loss; the same command goes on with the next case. The curves are beside it as a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Row, Skipped, keep_freed_memory, load, number, peak_memory, progress, table
from pipelines import (
    BOTH,
    EAGER,
    OURS,
    PEER,
    Backbone,
    Bench,
    Embedder,
    Pooler,
    add_arguments,
    build,
    build_pool,
    check_tokens,
    execution,
    loaded_base,
    share,
    texts_of,
)
from rows import run_cases
from torch import Tensor
from train_step import RANK, TEMPERATURE, batch_to

from mlpool.embedder import DESIGNS

HEADER = ["", "run", "wall ms", "cpu ms", "texts/s", "peak MiB", "loss 1", "loss n", "vs plain", "vs cached", "errors",
          "target"]  # fmt: skip
PEER_CACHED, MEAN, MEAN_CACHED = "sentence-transformers cached", "mlpool mean", "mlpool mean cached"
# By what they embed: the first of each is what the others' losses are compared with.
ALIKE = ((PEER, PEER_CACHED, MEAN, MEAN_CACHED), (EAGER, OURS))
FIRST, CURVE = 1e-4, 2e-2
LOW_FIRST, LOW_CURVE = 5e-2, 2e-1  # in half precision
# Times as fast as the plain and the cached loss, and whether in no more memory than the plain one, by lengths; and the
# default pool's most time over mean pooling's.
WANTED = {"24": (1.0, 1.3, False), "pairs": (1.5, 2.0, True)}
POOL = 1.05
RATE = 1e-4
QUIET = 0.9  # of the threads' time the part that they got; of less the processor's time decides
MOST_TOKENS, MOST_PAIRS = 256, 3000  # of a text, of a source
BUDGET = ((0.0, 0, 0.0),) * 3  # of `Bench`, whose rounds are not used here


@dataclass(frozen=True)
class Case:
    """A base, and the pairs of a step.

    design, pooler: those of `mlpool`, of which there is one each. targets: whether there are any for this base.
    """

    size: str
    lengths: str
    batch: int
    steps: int
    mini_batch: int
    design: str = BOTH
    pooler: str = "default"
    targets: Any = True

    @property
    def name(self) -> str:
        return f"{self.size} {self.lengths}"


REAL = "smollm2"
CASES = {
    "quick": [Case(REAL, "24", 8, 3, 96), Case(REAL, "pairs", 8, 3, 512)],
    "full": [
        Case(REAL, "24", 16, 6, 96), Case(REAL, "pairs", 16, 6, 512),
        Case("qwen2-0.5b", "24", 8, 4, 96), Case("qwen2-0.5b", "pairs", 8, 4, 512),
    ],
}  # fmt: skip


def pairs_of(case: Case, data: Path, real: bool) -> list[tuple[str, str]]:
    """The pairs of all steps: real ones, or random words in their lengths; every text once."""
    paths = sorted((data / "pairs").glob("*/train.jsonl"))
    if not paths:
        raise Skipped(f"no data at {data}/pairs/*/train.jsonl; pass --data with the folder pairs/")
    rows = []
    for path in paths:
        with path.open(encoding="utf8") as file:
            rows += [json.loads(line) for line, _ in zip(file, range(MOST_PAIRS), strict=False)]
    rows = list({row["positive"]: row for row in rows}.values())
    random.Random(0).shuffle(rows)
    count = case.batch * case.steps
    if case.lengths != "pairs":  # two halves of a long text, which are cut there
        words = [row["positive"].split() for row in rows]
        found = [(" ".join(w[:30]), " ".join(w[30:])) for w in words if len(w) >= 60][:count]
    else:
        found = [(row["query"], row["positive"]) for row in rows[:count]]
    if real:
        return found
    most = MOST_TOKENS if case.lengths == "pairs" else int(case.lengths)
    texts = texts_of([min(len(text.split()) + 1, most) for pair in found for text in pair])
    return list(zip(texts[::2], texts[1::2], strict=True))


class Providers:
    """All providers of a case over the same weights, each with its own values of them and its own optimizer."""

    def __init__(self, case: Case, base: Any, pairs: Sequence[tuple[str, str]]) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        from mlpool.training.losses import InfoNCE

        base.model.requires_grad_(True)
        models = build(base, case.design, case.pooler, RANK)
        ours: Any = models[OURS]
        backbone = Backbone(
            share(ours[0].model), base.tokenizer, "mean-bidirectional", max_seq_length=base.max_seq_length
        )
        pool = build_pool(DESIGNS["mean-bidirectional"], backbone.hidden_size, backbone.num_layers, "default")
        models[MEAN] = Embedder(
            modules=OrderedDict(backbone=backbone, pooler=Pooler(pool)), device=str(base.model.device)
        )
        self.models: dict[str, Any] = models | {PEER_CACHED: models[PEER], MEAN_CACHED: models[MEAN]}
        for model in self.models.values():
            model.train()
        scale, tokens = 1 / TEMPERATURE, {"mini_batch_tokens": case.mini_batch}
        self.losses: dict[str, Callable[..., Tensor]] = {
            PEER: MultipleNegativesRankingLoss(models[PEER], scale=scale),
            PEER_CACHED: CachedMultipleNegativesRankingLoss(
                models[PEER], scale=scale, mini_batch_num_tokens=case.mini_batch
            ),
            MEAN: InfoNCE(models[MEAN], TEMPERATURE),
            MEAN_CACHED: InfoNCE(models[MEAN], TEMPERATURE, cached=True, **tokens),
            EAGER: MultipleNegativesRankingLoss(models[EAGER], scale=scale),
            OURS: InfoNCE(ours, TEMPERATURE),
        }  # fmt: skip
        self.tokens = sum(check_tokens(models, [text for pair in pairs for text in pair]))
        self.batches = [pairs[i : i + case.batch] for i in range(0, len(pairs), case.batch)]
        trained = [p for p in ours.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in trained]
        self.trained = trained
        self.values = {name: [p.clone() for p in start] for name in self.losses}
        self.optimizers = {name: torch.optim.AdamW(trained, lr=RATE, fused=True) for name in self.losses}

    def columns(self, name: str, step: int) -> list[dict[str, Any]]:
        model = self.models[name]
        return [batch_to(model, [pair[side] for pair in self.batches[step]]) for side in (0, 1)]

    def backward(self, name: str, columns: list[dict[str, Any]]) -> float:
        value = self.losses[name](columns, torch.arange(len(self.batches[0]), device=self.models[name].device))
        value.backward()
        return value.item()

    @torch.no_grad()
    def put(self, name: str) -> None:
        """This provider's own values into the weights that all share; no gradients."""
        for parameter, value in zip(self.trained, self.values[name], strict=True):
            parameter.copy_(value)
            parameter.grad = None

    @torch.no_grad()
    def take(self, name: str) -> None:
        for parameter, value in zip(self.trained, self.values[name], strict=True):
            value.copy_(parameter)


class PeersBench(Bench):
    """Measures case after case."""

    def measure(self, case: Case) -> list[Row]:
        self.base, self.base_name = None, ""
        keep_freed_memory()
        before = load()
        real = case.size == REAL
        if real and not (self.args.base and Path(self.args.base).is_dir()):
            raise Skipped("no folder of SmolLM2: make bases/smollm2, and pass --base bases/smollm2")
        pairs = pairs_of(case, self.args.data, real)
        if real:
            self.base, self.base_name = loaded_base(str(self.args.base), self.device, self.dtype), case.size
        else:
            self.load(case.size, share=1.5)
        self.base.max_seq_length = MOST_TOKENS if case.lengths == "pairs" else int(case.lengths)
        providers = Providers(case, self.base, pairs)
        peaks, walls, cpus, losses = self._steps(case, providers)
        threads, had = torch.get_num_threads(), sum(map(sum, cpus.values())) / sum(map(sum, walls.values()))
        busy = self.device.type == "cpu" and had < QUIET * threads
        rows = []
        for name in losses:
            row: Row = case_key(case, str(self.dtype)[6:]) | {
                "preset": case.size, "mode": "fine-tuning", "design": case.design, "lengths": case.lengths,
                "provider": name, "texts": 2 * case.batch, "tokens": providers.tokens, "mini_batch": case.mini_batch,
                "execution": execution(providers.models[name][0]), "extra_mib": peaks[name] / 2**20,
                "losses": " ".join(f"{value:.6g}" for value in losses[name]),
                "trained": sum(p.numel() for p in providers.trained), "cores": had,
            }  # fmt: skip
            rows.append(row | {"median_ms": median(walls[name]) * 1e3, "cpu_ms": median(cpus[name]) * 1e3})
        compare(rows, losses, self.low, "cpu_ms" if busy else "median_ms", bool(case.targets))
        print(f"\n{case.name}: {case.batch} pairs a step, {providers.tokens // len(pairs):,} tokens a pair")
        print(table(HEADER, map(cells, rows)))
        judge = "processor, as others had the rest" if busy else "clock"
        found = "" if before is None else f" (load {before:.1f} before)"
        print(f"the steps had {had:.2f} cores for {threads} threads{found}: judged by the {judge}", flush=True)
        return rows

    def _steps(self, case: Case, providers: Providers) -> tuple[dict[str, Any], ...]:
        """Peak bytes, seconds by the clock and of the processor, and losses of each provider."""
        names = list(providers.losses)
        peaks, walls, cpus, losses = ({name: [] for name in names} for _ in range(4))
        for name in names:
            progress(f"{case.name}: memory of {name}")
            providers.put(name)
            run = partial(providers.backward, name, providers.columns(name, 0))
            peaks[name] = peak_memory(run, self.device)[0]  # type: ignore[assignment]
        for step in range(case.steps):
            progress(f"{case.name}: step {step + 1} of {case.steps}")
            for name in names[step % len(names) :] + names[: step % len(names)]:
                providers.put(name)
                columns, made = providers.columns(name, step), []
                began = time.process_time()
                walls[name].append(self.clock(partial(self._step, providers, name, columns, made), latency=True))
                cpus[name].append(time.process_time() - began)
                losses[name] += made
                providers.take(name)
        return peaks, walls, cpus, losses

    @staticmethod
    def _step(providers: Providers, name: str, columns: list[dict[str, Any]], made: list[float]) -> None:
        made.append(providers.backward(name, columns))
        providers.optimizers[name].step()  # leaves out what has no gradient: the pool under mean pooling


def case_key(case: Case, dtype: str) -> Row:
    return {"case": case.name, "batch": case.batch, "steps": case.steps, "dtype": dtype}


def compare(rows: list[Row], losses: dict[str, list[float]], low: bool, clock: str, targets: bool) -> None:
    """Write errors, speeds and targets into the rows of a case; what is out of bounds has no speed."""
    of = {row["provider"]: row for row in rows}
    first, curve = (LOW_FIRST, LOW_CURVE) if low else (FIRST, CURVE)
    for names in ALIKE:
        for name in names:
            off = [abs(a - b) / abs(b) for a, b in zip(losses[name], losses[names[0]], strict=True)]
            green = off[0] <= first and all(e <= curve for e in off)  # NaN is red
            of[name] |= {"error": off[0], "curve_error": max(off), "green": green, "target": "", "target_met": None}
    red = {name for name, row in of.items() if not row["green"]}
    for name, row in of.items():
        row["judged"] = clock
        if name in red:
            del row["median_ms"], row["cpu_ms"]
            continue
        row["texts_per_s"] = row["texts"] / row[clock] * 1e3
        for peer, column in ((PEER, "ratio_plain"), (PEER_CACHED, "ratio_cached")):
            if peer not in red:
                row[column] = of[peer][clock] / row[clock]
    if not targets or {PEER, PEER_CACHED, MEAN} & red:
        return
    mean, peer = of[MEAN], of[PEER]
    plain, cached, in_memory = WANTED[mean["lengths"]]
    met = mean["ratio_plain"] >= plain and mean["ratio_cached"] >= cached
    met &= not in_memory or mean["extra_mib"] <= peer["extra_mib"]
    _judge(mean, f">= {plain}x plain{' in its memory' * in_memory}, >= {cached}x cached", met)
    if OURS not in red:
        _judge(of[OURS], f"<= {POOL}x mlpool mean", of[OURS][clock] <= POOL * mean[clock])


def _judge(row: Row, target: str, met: bool) -> None:
    row |= {"target": f"{target}: {'met' if met else 'MISSED'}", "target_met": met}


def cells(row: Row) -> list[str]:
    first, *_, last = f"{row['losses']} ".split(" ")[:-1] if " " in row["losses"] else (row["losses"],) * 2
    errors = f"{row['error']:.0e} | {row['curve_error']:.0e}"
    start, middle = [row["provider"], row["execution"]], [number(row["extra_mib"]), first, last]
    if not row["green"]:
        return [*start, "-", "-", "-", *middle, "-", "-", errors, "WRONG"]
    ratios = [f"{number(row[name])}x" if name in row else "-" for name in ("ratio_plain", "ratio_cached")]
    speeds = [number(row[name]) for name in ("median_ms", "cpu_ms", "texts_per_s")]
    return [*start, *speeds, *middle, *ratios, errors, row["target"]]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Every provider's losses, one pair of axes a case; needs matplotlib."""
    from plots import pyplot

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4.5 * len(cases), 3.6), squeeze=False, layout="constrained")
    for case, axis in zip(cases, axes[0], strict=True):
        for i, row in enumerate(row for row in rows if row["case"] == case):
            values = [float(value) for value in str(row["losses"]).split()]
            style = {"linewidth": 7 - i, "alpha": 0.6} if i else {"linewidth": 7, "color": "0.8"}
            axis.plot(range(1, len(values) + 1), values, label=row["provider"], **style)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss")
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--base", help="a folder with SmolLM2-135M (make bases/smollm2)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with pairs/")
    parser.add_argument("--steps", type=int, help="of each provider; default: the case's")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("this benchmark needs peft: pip install 'mlpool[train]'")
    args.full = args.full or not args.quick
    bench = PeersBench("train-peers", args, BUDGET)
    cases = bench.chosen(CASES["full" if args.full else "quick"])
    if args.steps:
        cases = [replace(case, steps=args.steps) for case in cases]
    todo = [(case_key(case, str(bench.dtype)[6:]), partial(bench.measure, case)) for case in cases]
    status = run_cases(todo, bench.rows, bench.device, args.minutes)
    found = [row for key, _ in todo for row in bench.rows.of(**key) if "losses" in row]
    if found and importlib.util.find_spec("matplotlib") is not None:
        plot(found, bench.rows.path.with_suffix(".png"))
    return status


if __name__ == "__main__":
    sys.exit(main())
