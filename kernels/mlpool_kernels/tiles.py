"""Tile sizes of every kernel: the candidates, which one is used, and a file that overrides the choice.

The first candidate of a kernel is the default. `benchmarks/tune.py` times all of them on the GPU at hand and writes a
JSON file {kernel: tile}; MLPOOL_TILES=that file makes it the choice. Every candidate is compiled for four
architectures by the tests, without spills and within shared memory. A kernel that holds whole rows has NUMBERS in place
of blocks: how many numbers its tile has.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache

from .runtime import power_of_2

Tile = dict[str, int]

TILES: dict[str, list[Tile]] = {
    "mean": [
        {"BLOCK_T": 16, "BLOCK_D": 256, "num_warps": 4},
        {"BLOCK_T": 32, "BLOCK_D": 128, "num_warps": 4},
        {"BLOCK_T": 8, "BLOCK_D": 512, "num_warps": 4},
    ],
    "unit_mean": [{"NUMBERS": 4096, "num_warps": 4}, {"NUMBERS": 4096, "num_warps": 8}],
    "last": [{"BLOCK_D": 1024, "num_warps": 4}],
    "gather_backward": [
        {"BLOCK_T": 16, "BLOCK_D": 256, "num_warps": 4},
        {"BLOCK_T": 8, "BLOCK_D": 512, "num_warps": 4},
    ],
    "attend": [
        {"BLOCK_D": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_D": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        {"BLOCK_D": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    ],
    "attend_text": [
        {"BLOCK_D": 32, "NUMBERS": 1 << 14, "num_warps": 8, "num_stages": 2},
    ],
    "norm": [{"NUMBERS": 4096, "num_warps": 4}, {"NUMBERS": 8192, "num_warps": 8}],
    "softmax": [
        {"BLOCK_K": 32, "BLOCK_N": 64, "num_warps": 4},
        {"BLOCK_K": 64, "BLOCK_N": 64, "num_warps": 4},
    ],
    "mix": [
        {"BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_D": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    ],
    "feed_forward": [
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 4},
    ],
    "gate": [{"BLOCK_R": 16, "BLOCK_F": 128, "num_warps": 4}, {"BLOCK_R": 16, "BLOCK_F": 256, "num_warps": 8}],
}


@lru_cache
def _overrides() -> dict[str, Tile]:
    path = os.environ.get("MLPOOL_TILES")
    if not path:
        return {}
    with open(path) as file:
        chosen = json.load(file)
    unknown = set(chosen) - set(TILES)
    if unknown:
        raise ValueError(f"MLPOOL_TILES={path} names unknown kernels {sorted(unknown)}; known: {sorted(TILES)}")
    return chosen


def tile(kernel: str, hidden: int | None = None, wide: bool = False) -> Tile:
    """The tile of `kernel`; `hidden` shrinks BLOCK_D to a small D, `wide` (float32 operands) halves its depth."""
    chosen = dict(_overrides().get(kernel, TILES[kernel][0]))
    if wide:
        # Four-byte operands in twice the shared memory and registers: half as deep.
        chosen["BLOCK_D"] = max(16, chosen["BLOCK_D"] // 2)
        chosen["num_stages"] = min(2, chosen.get("num_stages", 2))
    if hidden is not None and "BLOCK_D" in chosen:
        chosen["BLOCK_D"] = min(chosen["BLOCK_D"], power_of_2(hidden, 16))
    return chosen


def whole_rows(kernel: str, hidden: int) -> tuple[Tile, int, int]:
    """The options of a kernel that holds whole rows of D, and how its NUMBERS lie: rows, and columns at least D."""
    chosen = tile(kernel)
    columns = power_of_2(hidden, 16)
    return chosen, max(1, chosen.pop("NUMBERS") // columns), columns
