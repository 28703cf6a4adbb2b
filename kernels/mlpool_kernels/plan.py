"""The cost model: which exact form of each step is cheapest, for these sizes.

Every form gives the same numbers; they differ in floating-point operations, memory and launches. FLOP counts are two
per multiply-add. Work on weights alone (`once`) is paid per weight update: in training at every step, in evaluation
only when the folded weights are not cached.

`predict` turns a plan into seconds by the `Rates` of a device: each step is a list of operations, and an operation
takes launch + FLOP / rate + bytes / memory. A sum, not the larger of the two: it is smooth in every size, rates are
fitted to it one by one (`benchmarks/tune.py`), and torch.compile needs no guard per operation. `choose` compares those
seconds where rates were fitted for the device; elsewhere it counts FLOP, and keeps to a few constants for what FLOP do
not tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .runtime import power_of_2

KEYS = ("absorbed", "plain")
VALUES = ("early", "absorbed", "late")
LAUNCHES = ("one", "two")
FEED_FORWARD = ("fused", "chunked")
MEMORY = ("save", "recompute_ff", "recompute")
MIX = ("kernel", "product")
CHOICES = {
    "keys": KEYS, "values": VALUES, "launches": LAUNCHES, "feed_forward": FEED_FORWARD, "memory": MEMORY, "mix": MIX,
}  # fmt: skip
STEPS = ("scores, softmax", "values, mixing", "feed-forward, mean")

# What the kernels can hold in one tile: the keys of a text, its latents, the numbers of a head.
ONE_LAUNCH_KEYS, MIX_LATENTS, MIX_HEAD_DIM, MIX_SCORES = 128, 128, 128, 8192
# Without fitted rates: one launch re-reads a text's rows for every block of columns, which is worth it up to this many
# scores per key.
ONE_LAUNCH_COLUMNS = 1024
# The fused feed-forward saves writing and reading [a|g], 4 bytes for 2·D operations: worth it for a small D, and for
# few latents, where launches count. Elsewhere a product at library speed plus a second pass is faster.
FUSED_HIDDEN, FUSED_LATENTS = 1536, 128
# In torch every number of VO is written, copied for a head's product and read, which takes a CPU as long as so many
# FLOP (early and late values measured against each other at eight sizes).
MOVED_FLOPS = 200
# Early values that a kernel mixes head by head are two launches, late ones ten or more, which take a small pool longer
# than any FLOP: late ones are for what saves more than half of them.
LATE_COST = 2
# What a backward pass may keep alive before it computes again instead, as a share of the device's memory.
SAVED_SHARE = 0.1


# Of two forms of the values the one that takes no memory for folding is kept unless the other gains so much.
GAIN = 0.95


class Rates(NamedTuple):
    """What a device does in a second, for one compute dtype.

    product: FLOP/s of the library's matrix products. attend, mix, feed_forward: FLOP/s of these kernels (mixing counted
    twice, for the norm behind it). gate: numbers of [a|g] a second that a plain feed-forward's gate reads. memory:
    bytes/s, read and written. launch: seconds of one operation that does nothing. source: "default", or "fitted for"
    the device's name.
    """

    product: float
    attend: float
    mix: float
    feed_forward: float
    gate: float
    memory: float
    launch: float
    source: str


# To show seconds where none were measured: by device type and bytes of the dtype. The GPU's are an H200's measured
# product and bandwidth and the kernels' estimates from their binaries, the CPU's those of two cores.
DEFAULT_RATES = {
    ("cuda", 2): Rates(7.5e14, 8e13, 2e14, 5e14, 7e11, 4.3e12, 8e-6, "default"),
    ("cuda", 4): Rates(5e13, 1e13, 1e13, 2e13, 4e11, 4.3e12, 8e-6, "default"),
    ("cpu", 4): Rates(1.6e11, 1.6e11, 1.6e11, 1.6e11, 2.5e9, 1e10, 1e-5, "default"),
}


def default_rates(device: str, itemsize: int) -> Rates:
    """The rates to predict by where none were fitted; device: a torch device type."""
    known = DEFAULT_RATES.get((device, itemsize))
    return known or DEFAULT_RATES["cuda" if device == "cuda" else "cpu", 4]


class Sizes(NamedTuple):
    """Sizes of one call: batch B, keys n per text, hidden D, latents R, heads H, head_dim d, width F."""

    batch: int
    keys: int
    hidden: int
    latents: int
    heads: int
    head_dim: int
    width: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Plan:
    """The chosen forms; see `attend.py`, `mix.py` and `feed_forward.py` for what each one computes.

    keys: "absorbed" | "plain". values: "absorbed" | "early" | "late". launches: "one" | "two" for gather, norm,
    scores and softmax. feed_forward: "fused" | "chunked". memory: "save" what the backward needs, "recompute_ff" all
    but the feed-forward's width, "recompute" everything from the gathered rows. mix: "kernel" | "product" for mixing,
    residual, norm and mean.
    """

    keys: str = "absorbed"
    values: str = "early"
    launches: str = "two"
    feed_forward: str = "chunked"
    memory: str = "save"
    mix: str = "product"

    def __str__(self) -> str:
        return f"{self.keys} {self.values} {self.launches} {self.feed_forward} {self.memory} {self.mix}"

    @staticmethod
    @lru_cache
    def parse(text: str) -> Plan:
        """The plan that `str` wrote: an op's schema carries it as a string."""
        return Plan(*text.split())

    def override(self, choices: dict[str, str]) -> Plan:
        """This plan with some choices replaced; an unknown one is a ValueError."""
        for name, value in choices.items():
            if name not in CHOICES:
                raise ValueError(f"unknown plan entry {name!r}; known: {', '.join(CHOICES)}")
            if value not in CHOICES[name]:
                raise ValueError(f"plan entry {name!r} must be one of {CHOICES[name]}, got {value!r}")
        return replace(self, **choices)


def key_flops(s: Sizes, form: str) -> tuple[int, int]:
    """(per text, once) of the scores. Once: Q itself, and absorbing Wk into it. One key: its softmax is 1 unscored."""
    if s.keys == 1:
        return 0, 0
    once = 2 * s.latents * s.hidden * s.inner
    if form == "absorbed":
        return 2 * s.keys * s.hidden * s.heads * s.latents, once + 2 * s.latents * s.inner * s.hidden
    return 2 * s.keys * s.inner * (s.hidden + s.latents), once


def value_flops(s: Sizes, form: str) -> tuple[int, int]:
    """(per text, once) of values, mixing and output projection."""
    mixing = 2 * s.latents * s.heads * s.keys * s.hidden
    if form == "absorbed":
        return 2 * s.keys * s.hidden * s.heads * s.hidden + mixing, 2 * s.hidden * s.inner * s.hidden
    project = 2 * s.keys * s.hidden * s.inner
    if form == "early":
        return 2 * project + mixing, 0
    return project + 2 * s.latents * s.inner * (s.keys + s.hidden), 0


def feed_forward_flops(s: Sizes) -> int:
    """Per text: W1 on R rows, W2 on one."""
    return 2 * s.latents * s.hidden * 2 * s.width + 2 * s.width * s.hidden


def reference_flops(s: Sizes) -> dict[str, int]:
    """Per text, of the equations as the paper's module computes them."""
    q = 2 * s.latents * s.hidden * s.inner
    return {
        "queries": q,
        "keys, values": 2 * 2 * s.keys * s.hidden * s.inner,
        "attention": 2 * 2 * s.latents * s.keys * s.inner,
        "output": q,
        "feed-forward": 2 * s.latents * s.hidden * 3 * s.width,
    }


def by_heads(s: Sizes, plan: Plan) -> bool:
    """Whether the mix kernel takes V and Wo and makes VO itself, head by head."""
    scores = power_of_2(s.keys, 16) * power_of_2(s.latents, 16)  # of a head, held whole in the backward pass
    fits = s.keys <= ONE_LAUNCH_KEYS and s.latents <= MIX_LATENTS and s.head_dim <= MIX_HEAD_DIM
    return plan.mix == "kernel" and plan.values == "early" and fits and scores <= MIX_SCORES


def saved_bytes(s: Sizes, plan: Plan, itemsize: int) -> int:
    """What plan.memory="save" keeps for the backward, per text."""
    columns = s.heads * s.latents
    kept = s.keys * (s.hidden + columns) + s.latents * s.hidden + s.latents * 2 * s.width
    kept += s.latents * s.hidden if plan.mix == "kernel" else 0
    kept += s.keys * (s.inner if plan.keys == "plain" else 0)
    kept += s.keys * (s.inner if plan.values != "absorbed" else 0)
    kept += s.keys * (s.heads * s.hidden if plan.values != "late" and not by_heads(s, plan) else 0)
    return kept * itemsize


# --- seconds ----------------------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One launch or library call on a batch. unit: the field of `Rates` that its FLOP go by."""

    unit: str
    flops: float
    bytes: float


def seconds(operations: Iterable[Operation], rates: Rates) -> float:
    """Of each operation its launch, and the longer of computing and moving, which go on side by side."""
    total = 0.0
    for unit, flops, moved in operations:
        computing, moving = flops / getattr(rates, unit), moved / rates.memory
        total = total + rates.launch + (computing if computing > moving else moving)
    return total


def key_operations(s: Sizes, plan: Plan, itemsize: int, *, cached: bool) -> list[Operation]:
    """From the gathered rows to the attention, by plan.keys and plan.launches.

    That rows are brought to one length and mixed costs no launch of its own, and [B,D] numbers more.
    """
    rows, columns, inner = s.batch * s.keys, s.heads * s.latents, s.inner
    read, weight = rows * s.hidden * itemsize, inner * s.hidden * itemsize
    scores, queries = rows * columns * itemsize, columns * s.hidden * itemsize
    if s.keys == 1:
        return [Operation("product", 0, 2 * read)]
    (per_text, once), operations = key_flops(s, plan.keys), []
    if not cached:
        folded = weight + queries if plan.keys == "absorbed" else 0
        operations.append(Operation("product", once, weight + folded))
    if plan.launches == "one":
        return [*operations, Operation("attend", s.batch * per_text, 3 * read + queries + scores)]
    operations.append(Operation("product", 0, 2 * read))
    if plan.keys == "absorbed":
        operations.append(Operation("product", s.batch * per_text, read + queries + scores))
    else:
        k = rows * inner * itemsize
        operations.append(Operation("product", 2 * rows * inner * s.hidden, read + weight + k))
        operations.append(Operation("product", 2 * rows * inner * s.latents, k + s.latents * inner * itemsize + scores))
    return [*operations, Operation("product", 0, 2 * scores)]


def value_operations(s: Sizes, plan: Plan, itemsize: int, *, cached: bool) -> list[Operation]:
    """From the attention to the normed latents, by plan.values and plan.mix."""
    rows, columns, inner = s.batch * s.keys, s.heads * s.latents, s.inner
    read, weight = rows * s.hidden * itemsize, inner * s.hidden * itemsize
    v, vo, attention = rows * inner * itemsize, rows * s.heads * s.hidden * itemsize, rows * columns * itemsize
    y = s.batch * s.latents * s.hidden * itemsize
    project = 2 * rows * inner * s.hidden
    if plan.values == "late":
        outputs = s.batch * s.latents * inner
        return [
            Operation("product", project, read + weight + v),
            Operation("product", 2 * outputs * s.keys, attention + v + outputs * itemsize),
            Operation("product", 2 * outputs * s.hidden, outputs * itemsize + weight + y),
            Operation("product", 0, 2 * y),
            Operation("product", 0, y),
        ]
    operations, mixing = [], 2 * rows * columns * s.hidden
    if plan.values == "absorbed":
        folded = s.heads * s.hidden * s.hidden * itemsize
        if not cached:
            operations.append(Operation("product", value_flops(s, "absorbed")[1], 2 * weight + folded))
        operations.append(Operation("product", 2 * rows * s.heads * s.hidden * s.hidden, read + folded + vo))
    else:
        operations.append(Operation("product", project, read + weight + v))
        if by_heads(s, plan):
            return [*operations, Operation("mix", project + 2 * mixing, 2 * (attention + v) + weight + y)]
        operations.append(Operation("product", project, v + weight + vo))
    if plan.mix == "kernel":
        return [*operations, Operation("mix", 2 * mixing, 2 * (attention + vo) + y)]
    operations.append(Operation("product", mixing, attention + vo + y))
    return [*operations, Operation("product", 0, 2 * y), Operation("product", 0, y)]


def feed_forward_operations(s: Sizes, plan: Plan, itemsize: int) -> list[Operation]:
    """From the normed latents to the pooled vector, by plan.feed_forward; a saved [a|g] is a plain product's."""
    first, second = 4 * s.batch * s.latents * s.hidden * s.width, 2 * s.batch * s.width * s.hidden
    moved = (s.batch * s.latents * s.hidden + 2 * s.width * s.hidden) * itemsize
    out = Operation("product", second, s.width * s.hidden * itemsize)
    if plan.feed_forward == "fused" and plan.memory != "save":
        return [Operation("feed_forward", first, moved), out]
    numbers = 2 * s.batch * s.latents * s.width
    return [Operation("product", first, moved + numbers * itemsize), Operation("gate", numbers, 0), out]


def predict(
    s: Sizes, plan: Plan, rates: Rates, *, itemsize: int, training: bool = False, cached: bool = True
) -> dict[str, float]:
    """Seconds of each of `STEPS` of one call: by `rates`, the backward as twice the forward.

    Args:
        itemsize: bytes of the compute dtype. training: with a backward pass, and what plan.memory computes again.
        cached: the folded weights are there already.
    """
    times = [
        seconds(key_operations(s, plan, itemsize, cached=cached), rates),
        seconds(value_operations(s, plan, itemsize, cached=cached), rates),
        seconds(feed_forward_operations(s, plan, itemsize), rates),
    ]
    if training:
        again = {"save": (0, 0, 0), "recompute_ff": (0, 0, 1), "recompute": (1, 1, 1)}[plan.memory]
        times = [t * (3 + more) for t, more in zip(times, again, strict=True)]
    return dict(zip(STEPS, times, strict=True))


# --- choice -----------------------------------------------------------------------------------------------------------


def choose(
    s: Sizes, *, training: bool, cached: bool, triton: bool, itemsize: int, memory_bytes: int, masked: bool = False,
    rates: Rates | None = None,
) -> Plan:  # fmt: skip
    """The cheapest plan.

    Args:
        s: the call's sizes. training: a backward pass will follow. cached: the folded weights are there already.
        triton: kernels will run. itemsize: bytes of the compute dtype. memory_bytes: of the device.
        masked: some keys are padding, which one launch does not take.
        rates: fitted for the device and dtype; None compares FLOP.
    """
    one = triton and not masked and s.keys <= ONE_LAUNCH_KEYS
    mixes = triton and s.latents <= MIX_LATENTS
    if rates is None:
        plan = _by_flops(s, cached=cached, triton=triton, one=one, mixes=mixes)
    else:
        plan = _by_seconds(s, rates, itemsize, cached=cached, triton=triton, one=one, mixes=mixes)
    if not training:
        return replace(plan, memory="recompute")
    if s.batch * saved_bytes(s, plan, itemsize) <= SAVED_SHARE * memory_bytes:
        return plan
    return replace(plan, memory="recompute_ff" if keys_fit(s, plan, itemsize, memory_bytes) else "recompute")


def _by_flops(s: Sizes, *, cached: bool, triton: bool, one: bool, mixes: bool) -> Plan:
    # The backward costs twice the forward everywhere, so it changes no comparison.
    def cost(flops: tuple[int, int]) -> int:
        per_text, once = flops
        return s.batch * per_text + (0 if cached else once)

    few_launches = mixes and by_heads(s, Plan(values="early", mix="kernel"))

    def of_values(form: str) -> int:
        moved = 0 if triton or form == "late" else s.keys * s.heads * s.hidden
        flops = cost(value_flops(s, form)) + s.batch * MOVED_FLOPS * moved
        return flops * LATE_COST if form == "late" and few_launches else flops

    # Written out, as torch.compile traces no `min` with a key over symbolic sizes.
    keys, values = KEYS[0], VALUES[0]
    for form in KEYS[1:]:
        keys = form if cost(key_flops(s, form)) < cost(key_flops(s, keys)) else keys
    for form in VALUES[1:]:
        values = form if of_values(form) < of_values(values) else values
    one = one and keys == "absorbed" and s.heads * s.latents <= ONE_LAUNCH_COLUMNS
    fused = triton and (s.hidden <= FUSED_HIDDEN or s.latents <= FUSED_LATENTS)
    return Plan(
        keys, values, "one" if one else "two", "fused" if fused else "chunked",
        mix="kernel" if mixes and values != "late" else "product",
    )  # fmt: skip


def _by_seconds(
    s: Sizes, rates: Rates, itemsize: int, *, cached: bool, triton: bool, one: bool, mixes: bool
) -> Plan:  # fmt: skip
    def of_keys(plan: Plan) -> float:
        return seconds(key_operations(s, plan, itemsize, cached=cached), rates)

    def of_values(plan: Plan) -> float:
        return seconds(value_operations(s, plan, itemsize, cached=cached), rates)

    def of_feed_forward(plan: Plan) -> float:
        return seconds(feed_forward_operations(s, replace(plan, memory="recompute"), itemsize), rates)

    plan = Plan(feed_forward="chunked")
    for keys, launches in (("plain", "two"), *((("absorbed", "one"),) if one else ())):
        other = replace(plan, keys=keys, launches=launches)
        plan = other if of_keys(other) < of_keys(plan) else plan
    for values, mix in itertools.product(VALUES, MIX if mixes else MIX[1:]):
        if values == "late" and mix == "kernel":
            continue
        other = replace(plan, values=values, mix=mix)
        plan = other if of_values(other) < GAIN * of_values(plan) else plan
    if triton:
        other = replace(plan, feed_forward="fused")
        plan = other if of_feed_forward(other) < of_feed_forward(plan) else plan
    return plan


def keys_fit(s: Sizes, plan: Plan, itemsize: int, memory_bytes: int) -> bool:
    """Whether all but the feed-forward's width may be kept."""
    kept = saved_bytes(s, plan, itemsize) - s.latents * 2 * s.width * itemsize
    return s.batch * kept <= SAVED_SHARE * memory_bytes
