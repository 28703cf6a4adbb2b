"""What is measured: presets, the cases of a quick and of a full run, and the targets of the design."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mlpool_kernels import Plan, Sizes
from mlpool_kernels import plan as plan_module

EVAL, TRAIN, STEP = "eval", "forward+backward", "step"
ALL = ("eager", "compiled", "mlpool")
PLAIN = ("eager", "mlpool")
# One provider per memory choice of the plan.
MEMORY = ("eager", "mlpool save", "mlpool recompute_ff", "mlpool recompute")
PATHS_TAKEN = ("direct", "dispatcher")
PATHS = ("eager", *(f"mlpool {path}" for path in PATHS_TAKEN))


class Preset(NamedTuple):
    """A pool and the backbone under it. kind: "multi" and "last" are pools, "gather" is the token pooling alone."""

    kind: str
    hidden: int
    layers: int
    paper: bool = True
    token_pooling: str = "last"


PRESETS = {
    "qwen2-0.5b": Preset("multi", 896, 24),
    "mistral-7b": Preset("multi", 4096, 32),
    "minilm": Preset("multi", 384, 6, token_pooling="mean"),
    "default-pool": Preset("multi", 896, 24, paper=False),
    "default-7b": Preset("multi", 4096, 32, paper=False),
    "last-layer": Preset("last", 4096, 1, token_pooling="mean"),
    "masked-mean": Preset("gather", 4096, 32, token_pooling="mean"),
}


@dataclass(frozen=True)
class Case:
    """One group of rows: every provider on the same work.

    batch: B. tokens: T, the states are then hidden states [B, T, D]; None starts from gathered states [B, L, D].
    padded: texts of T/2 to T tokens. latency: wall time to the end of the call, not the GPU's own time.
    targets: provider -> {"eager" or "compiled": least ratio, "floor": largest multiple of the floor, "memory": largest
    share of eager's extra memory}.
    """

    preset: str
    batch: int
    mode: str
    providers: tuple[str, ...] = PLAIN
    tokens: int | None = None
    padded: bool = True
    latency: bool = False
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def choices_of(provider: str) -> dict[str, str]:
    """Overrides of the plan that a provider's name asks for: "mlpool keys=plain mix=product", "mlpool recompute"."""
    _, *words = provider.split()
    return dict(word.split("=") if "=" in word else ("memory", word) for word in words if word not in PATHS_TAKEN)


def alternatives(s: Sizes, plan: Plan, *, training: bool, triton: bool, masked: bool) -> list[dict[str, str]]:
    """Every exact choice that differs from `plan` in one entry and runs differently, as overrides of it."""
    found = []
    if s.keys > 1:
        found += [{"keys": form} for form in plan_module.KEYS if form != plan.keys]
    found += [{"values": form} for form in plan_module.VALUES if form != plan.values]
    if triton and 1 < s.keys <= plan_module.ONE_LAUNCH_KEYS and not masked:
        if plan.keys == "absorbed":
            found += [{"launches": form} for form in plan_module.LAUNCHES if form != plan.launches]
        else:
            found.append({"keys": "absorbed", "launches": "one"})
    if triton and s.latents <= plan_module.MIX_LATENTS:
        if plan.values != "late":
            found += [{"mix": form} for form in plan_module.MIX if form != plan.mix]
        else:
            found.append({"values": "early", "mix": "kernel"})
    if triton and not (training and plan.memory == "save"):
        found += [{"feed_forward": form} for form in plan_module.FEED_FORWARD if form != plan.feed_forward]
    if training:
        found += [{"memory": form} for form in plan_module.MEMORY if form != plan.memory]
    return found


def eager(ratio: float, **more: float) -> dict[str, dict[str, float]]:
    return {"mlpool": {"eager": ratio, **more}}


GPU_MEMORY = {"mlpool save": {"eager": 3.5, "memory": 1 / 4}, "mlpool recompute": {"eager": 3.0, "memory": 1 / 10}}

CASES = {
    ("cpu", "quick"): [
        Case("qwen2-0.5b", 2, EVAL, ALL, targets=eager(8)),
        Case("qwen2-0.5b", 16, EVAL, targets=eager(10)),
        Case("qwen2-0.5b", 8, TRAIN, targets=eager(5)),
        Case("default-pool", 8, EVAL, tokens=64),
        Case("default-pool", 8, TRAIN, tokens=64),
        Case("default-pool", 8, STEP, tokens=64),
        Case("default-pool", 1, EVAL, PATHS, tokens=64, latency=True),
        Case("minilm", 4, EVAL, tokens=64),
        Case("minilm", 2, TRAIN, tokens=64),
    ],
    ("cpu", "full"): [
        Case("qwen2-0.5b", 2, EVAL, ALL, targets=eager(8)),
        Case("qwen2-0.5b", 16, EVAL, targets=eager(10)),
        Case("qwen2-0.5b", 8, TRAIN, MEMORY, targets={"mlpool save": {"eager": 5}}),
        Case("qwen2-0.5b", 16, TRAIN, targets=eager(6)),
        Case("qwen2-0.5b", 8, STEP),
        Case("default-pool", 16, EVAL, ALL, tokens=128),
        Case("default-pool", 16, TRAIN, ALL, tokens=128),
        Case("default-pool", 16, STEP, tokens=128),
        Case("default-pool", 1, EVAL, PATHS, tokens=64, latency=True),
        Case("minilm", 16, EVAL, ALL, tokens=128),
        Case("minilm", 8, TRAIN, tokens=128),
        Case("minilm", 8, STEP, tokens=128),
        Case("mistral-7b", 2, EVAL, targets=eager(3.5)),
        Case("last-layer", 1, EVAL, tokens=512, padded=False),
        Case("masked-mean", 4, EVAL, tokens=128, padded=False),
    ],
    ("cuda", "quick"): [
        Case("qwen2-0.5b", 256, EVAL, targets=eager(8)),
        Case("qwen2-0.5b", 64, TRAIN),
        Case("default-pool", 64, EVAL, tokens=128),
        Case("default-pool", 64, TRAIN, tokens=128, latency=True, targets=eager(2)),
        Case("minilm", 64, TRAIN, tokens=64),
    ],
    ("cuda", "full"): [
        Case("mistral-7b", 64, EVAL, ALL, targets=eager(4.2, compiled=3.8, floor=1.25)),
        Case("mistral-7b", 64, TRAIN, MEMORY, targets=GPU_MEMORY),
        Case("mistral-7b", 64, STEP),
        Case("mistral-7b", 1, EVAL, latency=True),
        Case("qwen2-0.5b", 256, EVAL, ALL, targets=eager(8, compiled=7)),
        Case("qwen2-0.5b", 256, TRAIN),
        Case("qwen2-0.5b", 1, EVAL, latency=True),
        Case("default-pool", 64, EVAL, ALL, tokens=128),
        Case("default-pool", 64, TRAIN, ALL, tokens=128, latency=True, targets=eager(2)),
        Case("default-pool", 64, STEP, tokens=128),
        Case("default-pool", 1, EVAL, PATHS, tokens=64, latency=True),
        Case("minilm", 64, EVAL, ALL, tokens=128),
        Case("minilm", 64, TRAIN, tokens=128),
        Case("last-layer", 8, EVAL, tokens=512, padded=False),
        Case("last-layer", 8, TRAIN, tokens=512, padded=False),
        Case("masked-mean", 64, EVAL, ALL, tokens=512, padded=False),
    ],
    # Every exact choice of the plan against the one picked; the providers follow from the pick.
    ("cpu", "choices-quick"): [
        Case("qwen2-0.5b", 2, EVAL),
        Case("default-pool", 8, EVAL, tokens=64),
        Case("default-pool", 8, TRAIN, tokens=64),
        Case("minilm", 4, EVAL, tokens=64),
        Case("minilm", 2, TRAIN, tokens=64),
    ],
    ("cpu", "choices"): [
        Case("qwen2-0.5b", 1, EVAL),
        Case("qwen2-0.5b", 2, EVAL),
        Case("qwen2-0.5b", 16, EVAL),
        Case("qwen2-0.5b", 2, TRAIN),
        Case("qwen2-0.5b", 8, TRAIN),
        Case("default-pool", 1, EVAL, tokens=64, latency=True),
        Case("default-pool", 16, EVAL, tokens=128),
        Case("default-pool", 16, TRAIN, tokens=128),
        Case("default-7b", 4, EVAL),
        Case("default-7b", 4, TRAIN),
        Case("minilm", 1, EVAL, tokens=64, latency=True),
        Case("minilm", 16, EVAL, tokens=128),
        Case("minilm", 8, TRAIN, tokens=128),
        Case("mistral-7b", 2, EVAL),
        Case("last-layer", 1, EVAL, tokens=512, padded=False),
    ],
    ("cuda", "choices-quick"): [
        Case("qwen2-0.5b", 64, EVAL),
        Case("default-pool", 64, EVAL, tokens=128),
        Case("default-pool", 64, TRAIN, tokens=128),
    ],
    ("cuda", "choices"): [
        Case("default-pool", 1, EVAL, tokens=64, latency=True),
        Case("default-pool", 64, EVAL, tokens=128),
        Case("default-pool", 64, TRAIN, tokens=128),
        Case("default-7b", 1, EVAL, latency=True),
        Case("default-7b", 64, EVAL),
        Case("default-7b", 64, TRAIN),
        Case("minilm", 1, EVAL, tokens=64, latency=True),
        Case("minilm", 64, EVAL, tokens=128),
        Case("minilm", 64, TRAIN, tokens=128),
        Case("qwen2-0.5b", 1, EVAL, latency=True),
        Case("qwen2-0.5b", 256, EVAL),
        Case("qwen2-0.5b", 64, TRAIN),
        Case("mistral-7b", 1, EVAL, latency=True),
        Case("mistral-7b", 64, EVAL),
        Case("mistral-7b", 16, TRAIN),
        Case("last-layer", 8, EVAL, tokens=512, padded=False),
        Case("last-layer", 8, TRAIN, tokens=512, padded=False),
    ],
}
