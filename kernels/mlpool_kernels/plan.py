"""The cost model: which exact form of each step is cheapest, for these sizes.

Every form gives the same numbers; they differ in floating-point operations, memory and launches. FLOP counts are two
per multiply-add. Work on weights alone (`once`) is paid per weight update: in training at every step, in evaluation
only when the folded weights are not cached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

KEYS = ("absorbed", "plain")
VALUES = ("early", "absorbed", "late")
LAUNCHES = ("one", "two")
FEED_FORWARD = ("fused", "chunked")
MEMORY = ("save", "recompute_ff", "recompute")
CHOICES = {"keys": KEYS, "values": VALUES, "launches": LAUNCHES, "feed_forward": FEED_FORWARD, "memory": MEMORY}

# One launch re-reads a text's rows for every block of columns: worth it up to this many scores per key.
ONE_LAUNCH_COLUMNS = 1024
# The fused feed-forward saves writing and reading [a|g], 4 bytes for 2·D operations: worth it for a small D, and for
# few latents, where launches count. Elsewhere a product at library speed plus a second pass is faster.
FUSED_HIDDEN, FUSED_LATENTS = 1536, 128
# What a backward pass may keep alive before it computes again instead, as a share of the device's memory.
SAVED_SHARE = 0.1


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
    but the feed-forward's width, "recompute" everything from the gathered rows.
    """

    keys: str = "absorbed"
    values: str = "early"
    launches: str = "two"
    feed_forward: str = "chunked"
    memory: str = "save"

    def __str__(self) -> str:
        return f"{self.keys} {self.values} {self.launches} {self.feed_forward} {self.memory}"

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


def saved_bytes(s: Sizes, plan: Plan, itemsize: int) -> int:
    """What plan.memory="save" keeps for the backward, per text."""
    columns = s.heads * s.latents
    kept = s.keys * (s.hidden + columns) + s.latents * s.hidden + s.latents * 2 * s.width
    kept += s.keys * (s.inner if plan.keys == "plain" else 0)
    kept += s.keys * (s.inner if plan.values != "absorbed" else 0)
    kept += s.keys * (s.heads * s.hidden if plan.values != "late" else 0)
    return kept * itemsize


def choose(s: Sizes, *, training: bool, cached: bool, triton: bool, itemsize: int, memory_bytes: int) -> Plan:
    """The cheapest plan.

    Args:
        s: the call's sizes. training: a backward pass will follow. cached: the folded weights are there already.
        triton: kernels will run. itemsize: bytes of the compute dtype. memory_bytes: of the device.
    """

    # The backward costs twice the forward everywhere, so it changes no comparison.
    def cost(flops: tuple[int, int]) -> int:
        per_text, once = flops
        return s.batch * per_text + (0 if cached else once)

    # Written out, as torch.compile traces no `min` with a key over symbolic sizes.
    keys, values = KEYS[0], VALUES[0]
    for form in KEYS[1:]:
        keys = form if cost(key_flops(s, form)) < cost(key_flops(s, keys)) else keys
    for form in VALUES[1:]:
        values = form if cost(value_flops(s, form)) < cost(value_flops(s, values)) else values
    one = triton and keys == "absorbed" and s.heads * s.latents <= ONE_LAUNCH_COLUMNS and s.keys <= 128
    fused = triton and (s.hidden <= FUSED_HIDDEN or s.latents <= FUSED_LATENTS)
    plan = Plan(keys, values, "one" if one else "two", "fused" if fused else "chunked")
    if not training:
        return replace(plan, memory="recompute")
    if s.batch * saved_bytes(s, plan, itemsize) <= SAVED_SHARE * memory_bytes:
        return plan
    return replace(plan, memory="recompute_ff" if keys_fit(s, plan, itemsize, memory_bytes) else "recompute")


def keys_fit(s: Sizes, plan: Plan, itemsize: int, memory_bytes: int) -> bool:
    """Whether all but the feed-forward's width may be kept."""
    kept = saved_bytes(s, plan, itemsize) - s.latents * 2 * s.width * itemsize
    return s.batch * kept <= SAVED_SHARE * memory_bytes
