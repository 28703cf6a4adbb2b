"""`pool.plan()`: what runs, where, and what it costs, as a table."""

from dataclasses import dataclass
from typing import Self

import torch
from mlpool_kernels import Plan, Rates, Sizes
from mlpool_kernels import plan as model


@dataclass(frozen=True)
class PlanReport:
    """What `plan()` returns; prints as a table.

    title: sizes and device. plan: the chosen forms. rows: (step, how, FLOP per text here, FLOP per text of the
    reference). once: FLOP per weight update. saved_bytes: kept for the backward, for the batch. seconds: predicted for
    each row and a batch, with the backward in training. rates: predicted by these (`mlpool_kernels.plan.Rates`).
    """

    title: str
    plan: Plan
    rows: list[tuple[str, str, int, int]]
    once: int
    saved_bytes: int
    seconds: list[float]
    rates: Rates

    @classmethod
    def of(
        cls, name: str, s: Sizes, plan: Plan, rates: Rates, device: torch.device, dtype: torch.dtype, *,
        triton: bool, masked: bool, tokens: int | None, training: bool,
    ) -> Self:  # fmt: skip
        """name: of the pool's class. masked: keys are tokens, some of them padding. tokens: T, where it matters."""
        reference = model.reference_flops(s)
        (score_flops, score_once), (value_flops, value_once) = (
            model.key_flops(s, plan.keys), model.value_flops(s, plan.values),
        )  # fmt: skip
        where = "Triton" if triton else "torch"
        one = triton and plan.launches == "one" and plan.keys == "absorbed" and not masked
        launch = f"{where}, one launch" if one else f"{where}, then matrix product"
        # Saved [a|g] is a plain product's, whatever the plan says of fusing.
        fused = triton and plan.feed_forward == "fused" and plan.memory != "save"
        ff_where = "Triton, fused" if fused else "chunks of W1, gate and mean"
        mixed = "one kernel" if triton and plan.mix == "kernel" and plan.values != "late" else "mixed by product"
        values_reference = reference["keys, values"] // 2 + reference["attention"] // 2 + reference["output"]
        scores_reference = reference["queries"] + reference["keys, values"] // 2 + reference["attention"] // 2
        rows = [
            (model.STEPS[0], f"{plan.keys} keys; {launch}", score_flops, scores_reference),
            (model.STEPS[1], f"{plan.values} output projection; {mixed}", value_flops, values_reference),
            (model.STEPS[2], ff_where, model.feed_forward_flops(s), reference["feed-forward"]),
        ]
        itemsize, batch = dtype.itemsize, s.batch
        mode = "training" if training else "inference"
        length = "" if tokens is None else f", T={tokens}"
        title = (
            f"{name}: B={batch}{length}, {s.keys} keys, D={s.hidden}, R={s.latents}, H={s.heads}, "
            f"d={s.head_dim}, F={s.width}; {mode} on {device}, {dtype}"
        )
        once = score_once + (value_once if plan.values == "absorbed" else 0)
        kept = batch * model.saved_bytes(s, plan, itemsize) if training and plan.memory == "save" else 0
        if training and plan.memory == "recompute_ff":
            kept = batch * (model.saved_bytes(s, plan, itemsize) - s.latents * 2 * s.width * itemsize)
        times = model.predict(s, plan, rates, itemsize=itemsize, training=training, cached=not training)
        return cls(title, plan, rows, once, kept, list(times.values()), rates)

    def __str__(self) -> str:
        lines = [self.title, f"  {'step':<20}{'how':<44}{'GFLOP/text':>12}{'reference':>12}{'ms/batch':>12}"]
        for (step, how, flops, reference), seconds in zip(self.rows, self.seconds, strict=True):
            lines.append(f"  {step:<20}{how:<44}{flops / 1e9:>12.3f}{reference / 1e9:>12.3f}{seconds * 1e3:>12.3f}")
        total, reference = sum(r[2] for r in self.rows), sum(r[3] for r in self.rows)
        fewer, time = f"{reference / total:.1f}x fewer", sum(self.seconds) * 1e3
        lines.append(f"  {'sum':<20}{fewer:<44}{total / 1e9:>12.3f}{reference / 1e9:>12.3f}{time:>12.3f}")
        lines.append(f"  once per weight update: {self.once / 1e9:.3f} GFLOP (queries and what is folded)")
        lines.append(f"  kept for the backward: {self.saved_bytes / 2**20:.1f} MiB (memory={self.plan.memory})")
        lines.append(f"  ms/batch is predicted; rates: {self.rates.source}")
        return "\n".join(lines)

    __repr__ = __str__
