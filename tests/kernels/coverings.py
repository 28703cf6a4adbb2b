"""Few combinations of options in which all choices that can act together still meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Options = dict[str, Any]


def every(options: Mapping[str, Sequence[Any]]) -> list[Options]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def covering(
    options: Mapping[str, Sequence[Any]], strength: int = 2, first: Iterable[Options] = ()
) -> list[Options]:  # fmt: skip
    """Combinations in which all values of any `strength` options meet; the same in every process.

    first: combinations of some of the options that are wanted besides, the others of which are free.
    Greedy: of a hundred drawn the one that brings most together for the first time.
    """
    draw = random.Random(0)
    missing = {
        tuple(zip(names, values, strict=True))
        for names in itertools.combinations(options, strength)
        for values in itertools.product(*(options[name] for name in names))
    }
    chosen: list[Options] = []
    wanted = iter(first)
    while (given := next(wanted, None)) is not None or missing:
        # One meeting that is missing is in all of them, so that each brings something.
        given = given or dict(min(missing, key=str))
        drawn = [{key: draw.choice(values) for key, values in options.items()} | given for _ in range(100)]
        chosen.append(max(drawn, key=lambda combination: len(missing & _meetings(combination, strength))))
        missing -= _meetings(chosen[-1], strength)
    return chosen


def _meetings(combination: Options, strength: int) -> set[tuple]:
    return set(itertools.combinations(combination.items(), strength))


def name(options: Options) -> str:
    """Of a combination, for the name of a test."""
    return "-".join(str(value).removeprefix("torch.") for value in options.values())
