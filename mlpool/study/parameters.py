"""Controls of equal size: a LoRA rank, or a pool size, at which a design trains as many parameters as another."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..pooling.trainable import PAPER
from .config import Entry, Study
from .runs import count_parameters, untrained

RANK, HEADS = "lora.rank", "pooler.num_heads"
CLOSE = 0.05  # how far from the other's number is still equal


def match_parameters(study: Study) -> list[str]:
    """Size the entries that are to match another, in place; returns what was done, a line each.

    An entry with `match: LABEL` matches that one; with `match_parameters: true` all others match the one that trains
    the most. By the LoRA rank where there is LoRA (alpha in proportion), else by the pool's heads.

    Raises:
        ValueError: an entry with neither, or one that comes no nearer than 5 % (the nearest is said).
    """
    wanted = {entry.label: entry.match for entry in study.entries if entry.match}
    if not wanted and not study.match_parameters:
        return []
    counts = {
        e.label: count(e) for e in study.entries if study.match_parameters or e.label in {*wanted, *wanted.values()}
    }
    if study.match_parameters:
        largest = max(counts, key=lambda label: counts[label])
        wanted = {label: wanted.get(label, largest) for label in counts if label != largest}
    lines = []
    for i, entry in enumerate(study.entries):
        if (label := wanted.get(entry.label)) is not None:
            target = counts[label]
            if abs(counts[entry.label] - target) > CLOSE * target:
                study.entries[i], said = _size(entry, label, target)
                lines.append(said)
    return lines


def count(entry: Entry) -> int:
    """Trainable parameters, of the embedder that a training would begin with."""
    found = count_parameters(untrained({**entry.train, "device": "cpu"}))["trainable"]
    gc.collect()
    return found


def _size(entry: Entry, label: str, target: int) -> tuple[Entry, str]:
    """The entry with the knob where its number of parameters, which is linear in it, comes nearest to `target`."""
    knob = RANK if entry.train.get("lora") else HEADS
    if knob == HEADS and not entry.design.has_latents:
        raise ValueError(
            f"{entry.label} cannot match {label}: it trains all weights and has no pool to size; use LoRA, whose rank "
            "can be chosen (train: {lora: {rank: 16}}), or leave it out of the matching"
        )
    one, two = (count(_turned(entry, knob, value)) for value in (1, 2))
    value = max(1, round(1 + (target - one) / (two - one)))
    sized = _turned(entry, knob, value)
    found = one + (two - one) * (value - 1)
    said = f"{entry.label}: {knob} {value} gives {found:,} trainable parameters, {label} has {target:,}"
    if abs(found - target) > CLOSE * target:
        raise ValueError(f"no {knob} comes within {CLOSE:.0%}; the nearest for {said}")
    return sized, said


def _turned(entry: Entry, knob: str, value: int) -> Entry:
    train: dict[str, Any] = dict(entry.train)
    if knob == RANK:
        lora = {"rank": 16, "alpha": 32, **(train["lora"] if isinstance(train["lora"], Mapping) else {})}
        train["lora"] = {**lora, "rank": value, "alpha": lora["alpha"] * value / lora["rank"]}
    else:
        pooler = train.get("pooler", "default")
        sizes = pooler if isinstance(pooler, Mapping) else PAPER if pooler == "paper" else {}
        train["pooler"] = {**sizes, "num_heads": value}
    return replace(entry, train=train)
