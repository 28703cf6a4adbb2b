"""Tile sizes of every kernel: the candidates, which one is used, and a file that overrides the choice.

The first candidate of a kernel is the default. `benchmarks/tune.py` times all of them on the GPU at hand and writes a
JSON file {kernel: tile}; MLPOOL_TILES=that file makes it the choice. Every candidate is compiled for four
architectures by the tests, without spills and within shared memory.
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
    "norm": [{"BLOCK_D": 512, "BLOCK_L": 4, "num_warps": 4}, {"BLOCK_D": 1024, "BLOCK_L": 2, "num_warps": 4}],
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
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 32, "GROUP": 8, "num_warps": 4, "num_stages": 4},
    ],
    # Two programs fit a multiprocessor at the first, so that one's gate runs beside the other's products.
    "feed_forward_tma": [
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP": 8, "num_warps": 16, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
    ],
    "gate": [{"BLOCK_R": 16, "BLOCK_F": 128, "num_warps": 4}, {"BLOCK_R": 16, "BLOCK_F": 256, "num_warps": 8}],
}


def candidates(kernel: str, capability: int | None) -> list[Tile]:
    """The tiles of `kernel` that suit a GPU: capability 90 for sm_90, None where it is not NVIDIA's."""
    if kernel == "feed_forward_tma":
        if capability is None or capability < 90:
            return []
        # From sm_100 on sums lie in tensor memory, which Triton does not fill from sixteen warps: it spills instead.
        return [t for t in TILES[kernel] if capability < 100 or t["num_warps"] < 16]
    return TILES[kernel]


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
