"""One training step, end to end: the paper's pipeline in eager PyTorch, sentence-transformers' mean pooling, mlpool.

    python benchmarks/train_step.py                a few minutes on two CPU cores; on a GPU every size
    python benchmarks/train_step.py --full         more batches, design 3, full fine-tuning
    python benchmarks/train_step.py --pooler paper --tuning lora --mini-batch-tokens 96

A step is InfoNCE (temperature 0.05) over queries, positives and one hard negative each, its backward pass, and AdamW;
LoRA of rank 16 (the paper's, but without dropout, which would differ from run to run) or all weights. The batch counts
queries: three times as many texts. The texts are tokenized before.

    eager                  pipelines.py's, under sentence-transformers' MultipleNegativesRankingLoss
    eager cached           the same under its CachedMultipleNegativesRankingLoss
    sentence-transformers  mean pooling, under MultipleNegativesRankingLoss
    mlpool                 InfoNCE, every activation kept
    mlpool cached          InfoNCE with cached gradients; both caches take --mini-batch-tokens at a time

The same training beside sentence-transformers, by speed and by loss curves: train_peers.py.

The learning rate is zero: AdamW does all its work and every step starts from the same weights. Prints tables and adds
their rows to a CSV in benchmarks/results/, batch by batch. What the columns mean:

    run         packed: no padding is computed; padded: it is
    peak MiB    of tensors above weights and optimizer state: gradients, activations and every workspace
    vs eager    texts/s over eager's at the same batch, or at its largest below
    error       relative, to eager (where it did not run, to the first that did) at the same batch: of the loss and,
                behind |, of all gradients of the pool or of the backbone, whichever is worse. A row out of bounds shows
                no speed, and the exit status is 1
    target      whether a batch fits into the memory of eager's largest below, and that one four times as large does
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from cases import TRAIN
from measure import (
    Row,
    free_memory,
    number,
    peak_memory,
    progress,
    rounds,
    table,
    touch,
)
from pipelines import (
    BOTH,
    EAGER,
    FILL,
    LAST,
    OURS,
    PEER,
    Bench,
    add_arguments,
    build,
    check_tokens,
    eager_bytes,
    execution,
    keep,
    lengths_of,
    nothing,
    spread,
    texts_of,
    timed,
)
from rows import run_cases
from torch import Tensor

HEADER = ["", "batch", "run", "median ms", "20-80 %", "texts/s", "peak MiB", "vs eager", "error", "target"]
EAGER_CACHED, OURS_CACHED = "eager cached", "mlpool cached"
PROVIDERS = (EAGER, EAGER_CACHED, PEER, OURS, OURS_CACHED)
TUNINGS = ("lora", "full")
COLUMNS = 3  # query, positive, hard negative
RANK, TEMPERATURE = 16, 0.05
# Largest relative errors of the loss and of the gradients; in low precision only mistakes are that large.
LOSS, GRADIENT = 1e-5, 1e-4
LOW_LOSS, LOW_GRADIENT = 5e-2, 3e-1
# Least batch in eager's memory, over eager's.
TARGET = 4
# Seconds for a provider, steps of it, seconds of a step beyond which there is no second: quick, full, GPU.
BUDGET = ((8.0, 3, 4.0), (30.0, 5, 15.0), (1.0, 5, 1.0))


@dataclass(frozen=True)
class Case:
    """A backbone, a pool and how they are trained; one table a batch.

    batches: of each provider, in queries. mini_batch: tokens of the cached losses. targets: whether mlpool's batch at
    eager's memory has one.
    """

    size: str
    design: str
    pooler: str
    tuning: str
    batches: Mapping[str, Sequence[int]]
    mini_batch: int
    lengths: str = "24"
    targets: Any = False

    @property
    def name(self) -> str:
        return f"{self.size} {self.design} {self.pooler} {self.tuning} {self.lengths}"

    @property
    def sizes(self) -> list[int]:
        return sorted({batch for batches in self.batches.values() for batch in batches})

    def key(self, batch: int, dtype: str) -> Row:
        return {"case": self.name, "batch": batch, "dtype": dtype, "mini_batch": self.mini_batch}


QUICK = {EAGER: (2,), PEER: (2, 8), OURS: (2, 8), OURS_CACHED: (2, 8)}
FEW, MANY = (1, 2, 4), (1, 2, 4, 16)
FULL = {EAGER: FEW, EAGER_CACHED: (4, 16), PEER: MANY, OURS: MANY, OURS_CACHED: (*MANY, 32)}
GPU = {EAGER: (16, 64), EAGER_CACHED: (64,), PEER: (16, 64, 256), OURS: (16, 64, 256), OURS_CACHED: (64, 256, 512)}
# Tokens: for every mini-batch the pool at the released sizes folds its weights, so that small ones are slow.
MINI = {"default": 96, "paper": 384}

CASES = {
    ("cpu", "quick"): [
        Case("qwen2-0.5b", BOTH, pooler, "lora", QUICK, mini, targets=True) for pooler, mini in MINI.items()
    ],
    ("cpu", "full"): [
        *(Case("qwen2-0.5b", BOTH, pooler, "lora", FULL, mini, targets=True) for pooler, mini in MINI.items()),
        Case("qwen2-0.5b", LAST, "paper", "lora", QUICK, 384, targets=True),
        Case("qwen2-0.5b", BOTH, "default", "full", QUICK, 96),
        *(Case("minilm", BOTH, pooler, "full", FULL, mini) for pooler, mini in MINI.items()),
        *(Case("mistral-7b", BOTH, pooler, "lora", QUICK, mini) for pooler, mini in MINI.items()),
    ],
    ("cuda", "full"): [
        Case("minilm", BOTH, "default", "full", GPU, 4096, "mixed"),
        *(Case("qwen2-0.5b", BOTH, pooler, "lora", GPU, 4096, "mixed", targets=True) for pooler in MINI),
        Case("qwen2-0.5b", BOTH, "paper", "full", GPU, 4096, "mixed", targets=True),
        Case("mistral-7b", BOTH, "paper", "lora", GPU, 4096, "mixed", targets=True),
    ],
}  # fmt: skip
CASES["cuda", "quick"] = [case for case in CASES["cuda", "full"] if case.size != "mistral-7b"]


class Trainer:
    """The providers of one case over the same weights, with their losses and one optimizer."""

    def __init__(self, case: Case, base: Any) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        from mlpool.training.losses import InfoNCE

        base.model.requires_grad_(True)
        self.models = build(base, case.design, case.pooler, RANK if case.tuning == "lora" else None)
        for model in self.models.values():
            model.train()
        eager, peer, ours = (self.models[name] for name in (EAGER, PEER, OURS))
        scale = 1 / TEMPERATURE
        self.losses: dict[str, Callable[..., Tensor]] = {
            EAGER: MultipleNegativesRankingLoss(eager, scale=scale),
            EAGER_CACHED: CachedMultipleNegativesRankingLoss(
                eager, scale=scale, mini_batch_num_tokens=case.mini_batch
            ),
            PEER: MultipleNegativesRankingLoss(peer, scale=scale),
            OURS: InfoNCE(ours, TEMPERATURE, cached=False, mini_batch_tokens=None),
            OURS_CACHED: InfoNCE(ours, TEMPERATURE, cached=True, mini_batch_tokens=case.mini_batch),
        }  # fmt: skip
        self.parts = {
            part: [p for p in module.parameters() if p.requires_grad]
            for part, module in (("backbone", ours[0]), ("pool", ours[1]))
        }
        self.trained = [p for parameters in self.parts.values() for p in parameters]
        # It leaves out what has no gradient: the pool under sentence-transformers.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # its state belongs to the weights, not to the step
        self.clear()
        self.texts = texts_of(lengths_of(case.lengths, COLUMNS * case.sizes[-1]))
        self.tokens = check_tokens(self.models, self.texts)
        # Of the first provider at each batch, and its gradients at the first batch.
        self.known: dict[int, float] = {}
        self.truth: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        for p in self.trained:
            p.grad = None

    def errors(self, batch: int, loss: float) -> tuple[float, float | None]:
        """Of the last step, relative to the first one at this batch: of the loss and, at the first batch, of the
        gradients."""
        known = self.known.setdefault(batch, loss)
        gradients = None
        if len(self.known) > 1:
            self.truth = {}
        else:
            grads = {
                part: [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                for part, parameters in self.parts.items()
            }
            self.truth = self.truth or {part: [g.clone() for g in tensors] for part, tensors in grads.items()}
            gradients = max(_relative(tensors, self.truth[part]) for part, tensors in grads.items())
        return abs(loss - known) / abs(known), gradients

    def execution(self, provider: str) -> str:
        """Whether padding is computed."""
        backbone: Any = self.models[provider.removesuffix(" cached")][0]
        return execution(backbone)

    def step(self, provider: str, batch: int) -> Callable[[], float]:
        """A call that does one step and returns the loss."""
        model = self.models[provider.removesuffix(" cached")]
        texts = self.texts[: COLUMNS * batch]
        columns = [batch_to(model, texts[i::COLUMNS]) for i in range(COLUMNS)]
        labels = torch.arange(batch, device=model.device)
        loss = self.losses[provider]

        def run() -> float:
            self.clear()
            value = loss([dict(column) for column in columns], labels)  # modules write into the features
            value.backward()
            self.optimizer.step()
            return value.item()

        return run


class TrainBench(Bench):
    """Measures batch after batch, with one case's models at a time."""

    trainer: Trainer | None = None
    case: Case | None = None

    def cases(self, tuning: Sequence[str] | None) -> list[Case]:
        found = self.chosen(CASES[self.device.type, "full" if self.full else "quick"], tuning=tuning)
        return [replace(case, mini_batch=self.args.mini_batch_tokens or case.mini_batch) for case in found]

    def measure(self, case: Case, batch: int) -> list[Row]:
        """Every provider at one batch."""
        trainer = self._trainer(case)
        runs, losses, extra, samples, errors, why = self._first_steps(case, trainer, batch)
        wrong = [name for name, error in errors.items() if not self._green(*error)]
        progress(f"{case.name}: batch {batch}, time")
        due = {name: (nothing, run) for name, run in runs.items() if name not in samples and name not in wrong}
        samples |= rounds(due, self.clock, self.budget, self.most, latency=True)
        trainer.clear()
        group = []
        for name in (*runs, *why):
            error = errors.get(name, (None, None))
            row: Row = case.key(batch, str(self.dtype)[6:]) | {
                "preset": case.size, "mode": "train step", "design": case.design, "pooler": case.pooler,
                "tuning": case.tuning, "lengths": case.lengths, "provider": name, "texts": COLUMNS * batch,
                "tokens": sum(trainer.tokens[: COLUMNS * batch]),
                "mini_batch_tokens": case.mini_batch if "cached" in name else None,
                "execution": trainer.execution(name), "trained": sum(p.numel() for p in trainer.trained),
                "loss": losses.get(name), "error": error[0], "limit": self._limits[0], "gradient_error": error[1],
                "gradient_limit": self._limits[1], "green": name not in wrong, "note": why.get(name, ""),
            }  # fmt: skip
            if name in samples and name not in wrong:
                row |= timed(samples[name], COLUMNS * batch, extra[name])
            group.append(row)
        known = self.rows.of(case=case.name, dtype=str(self.dtype)[6:], provider=EAGER)
        compare(group, [row for row in known if row["batch"] < batch], bool(case.targets) and not self.args.threads)
        print(f"\n{case.name}  batch {batch}, {COLUMNS} texts a query, mini-batches of {case.mini_batch} tokens")
        print(table(HEADER, map(cells, group)), flush=True)
        return group

    def _trainer(self, case: Case) -> Trainer:
        """The case's models, after what only a first call does."""
        if self.trainer is None or self.case != case:
            self.trainer = None
            # In full fine-tuning each weight has a gradient and two states of AdamW.
            self.load(case.size, share=4.0 if case.tuning == "full" else 1.5)
            progress(case.name)
            self.trainer, self.case = Trainer(case, self.base), case
            with torch.no_grad():
                for model in self.trainer.models.values():
                    model(batch_to(model, self.trainer.texts[:1]))
        return self.trainer

    def _first_steps(self, case: Case, trainer: Trainer, batch: int) -> tuple[Any, ...]:
        """One step of each provider, for its memory and its errors; what does not fit is left out with the reason."""
        runs: dict[str, Callable[[], float]] = {}
        losses: dict[str, float] = {}
        extra: dict[str, int] = {}
        samples: dict[str, list[float]] = {}
        errors: dict[str, tuple[float, float | None]] = {}
        why: dict[str, str] = {}
        for name in (name for name in PROVIDERS if batch in case.batches.get(name, ())):
            if name == EAGER and (reason := self._too_large(trainer, batch)):
                why[name] = reason
                continue
            progress(f"{case.name}: batch {batch}, memory of {name}")
            run = trainer.step(name, batch)
            trainer.clear()
            try:
                extra[name], seconds = peak_memory(keep(losses, name, run), self.device)
            except torch.OutOfMemoryError:
                why[name] = "out of memory"
                continue
            runs[name] = run
            if seconds > self.slow:
                samples[name] = [seconds]
            if name != PEER:
                errors[name] = trainer.errors(batch, losses[name])
        return runs, losses, extra, samples, errors, why

    @property
    def _limits(self) -> tuple[float, float]:
        return (LOW_LOSS, LOW_GRADIENT) if self.low else (LOSS, GRADIENT)

    def _green(self, loss: float, gradient: float | None) -> bool:
        # A NaN is red too.
        return loss <= self._limits[0] and (gradient is None or gradient <= self._limits[1])

    def _too_large(self, trainer: Trainer, batch: int) -> str:
        """Why eager is estimated not to fit; on a CPU nobody says so before the machine is out of memory."""
        texts, free = COLUMNS * batch, free_memory(self.device)
        need = eager_bytes(trainer.models[OURS], TRAIN, texts, max(trainer.tokens[:texts]))
        if need > FILL * free:
            return f"estimated to take {need >> 20:,} MiB, and {free >> 20:,} are free"
        touch(need, self.device)
        return ""


def _relative(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """‖values − truth‖ / ‖truth‖ over all tensors together; infinite where that is no number."""
    off, size = (
        sum(float(t.float().square().sum()) for t in tensors) ** 0.5
        for tensors in ((v - t for v, t in zip(values, truth, strict=True)), truth)
    )
    return off / size if off == off and size else float("inf")


def batch_to(model: Any, texts: Sequence[str]) -> dict[str, Any]:
    """The features of texts on the model's device."""
    features = model.preprocess(list(texts))
    return {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in features.items()}


def compare(group: Sequence[Row], known: Sequence[Row], wanted: bool) -> None:
    """Write into the rows of a batch what they are over eager at its largest batch up to theirs.

    Args:
        known: eager's rows at smaller batches.
    """
    base = next((r for r in reversed([*known, *group]) if r["provider"] == EAGER and "median_ms" in r), None)
    for row in group:
        row |= {"target": "", "target_met": None}
        if base is None or "median_ms" not in row:
            continue
        row["ratio_eager"] = row["texts_per_s"] / base["texts_per_s"]
        row["memory_share"] = row["extra_mib"] / base["extra_mib"]
        row["batch_ratio"] = ratio = row["batch"] / base["batch"]
        fits = row["memory_share"] <= 1
        if ratio > 1 and row["provider"] != PEER:
            row["target"] = f"{ratio:g}x eager's batch {'fits' if fits else 'does not fit'} its memory"
        if wanted and row["provider"] == OURS_CACHED and ratio == TARGET:
            row["target_met"] = fits
            row["target"] += f": {'met' if fits else 'MISSED'}"


def cells(row: Row) -> list[str]:
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    error += "" if row["gradient_error"] is None else f" | {row['gradient_error']:.0e}"
    start = [row["provider"], str(row["batch"]), row["execution"]]
    if "median_ms" not in row:
        return [*start, *["-"] * 5, error, row["note"] if row["green"] else "WRONG"]
    return [
        *start, number(row["median_ms"]), spread(row), number(row["texts_per_s"]), number(row["extra_mib"]),
        f"{number(row['ratio_eager'])}x" if "ratio_eager" in row else "-", error, row["target"],
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tuning", action="append", choices=TUNINGS, help="only this one")
    parser.add_argument("--mini-batch-tokens", type=int, help="of the cached losses; default: the case's")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("this benchmark needs peft: pip install 'mlpool[train]'")
    bench = TrainBench("train-step", args, BUDGET)
    todo = (
        (case.key(batch, str(bench.dtype)[6:]), partial(bench.measure, case, batch))
        for case in bench.cases(args.tuning) for batch in case.sizes
    )  # fmt: skip
    return run_cases(todo, bench.rows, bench.device, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
