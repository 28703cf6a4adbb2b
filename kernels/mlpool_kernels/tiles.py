"""Tile sizes of every kernel and rates of the device: the candidates, and the file that a device was tuned into.

The first candidate of a kernel is the default. `benchmarks/tune.py` times all of them on the GPU at hand, fits the cost
model's rates (`plan.py`) and writes both; MLPOOL_TILES=that file makes them the choice:

    {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0",
     "tiles": {kernel: {field: number}}, "rates": {"bfloat16": {field of Rates: number}}}

All of it is checked when it is first used. A file of another device is an error, one of other versions a warning. An
older file is the tiles alone. Every candidate is compiled for four architectures by the tests, without spills and
within shared memory. A kernel that holds whole rows has NUMBERS in place of blocks: how many numbers
its tile has.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .plan import Rates
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
        {"BLOCK_D": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_D": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        {"BLOCK_D": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_D": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ],
    "attend_text": [
        {"BLOCK_D": 32, "NUMBERS": 1 << 14, "num_warps": 8, "num_stages": 2},
    ],
    "norm": [{"NUMBERS": 4096, "num_warps": 4}, {"NUMBERS": 8192, "num_warps": 8}],
    "norm_backward": [{"NUMBERS": 2048, "num_warps": 8}],
    "sum": [{"BLOCK_P": 32, "BLOCK_N": 64, "num_warps": 4}, {"BLOCK_P": 16, "BLOCK_N": 128, "num_warps": 4}],
    "softmax": [
        {"BLOCK_K": 32, "BLOCK_N": 64, "num_warps": 4},
        {"BLOCK_K": 64, "BLOCK_N": 64, "num_warps": 4},
    ],
    "mix": [
        {"BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_D": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    ],
    "mix_heads": [
        {"BLOCK_D": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
    ],
    "mix_backward": [{"num_warps": 8, "num_stages": 1}],
    "feed_forward": [
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3},
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BLOCK_R": 64, "BLOCK_F": 64, "BLOCK_D": 32, "GROUP": 8, "num_warps": 4, "num_stages": 4},
    ],
    # Held to 128 registers, two programs of the first fit a multiprocessor: one's gate beside the other's products.
    "feed_forward_tma": [
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
        {"BLOCK_R": 128, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP": 8, "num_warps": 16, "num_stages": 3, "maxnreg": 128},
        {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
        {"BLOCK_R": 64, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3, "maxnreg": 255},
    ],
    "select": [{"NUMBERS": 512, "num_warps": 4}],
    "embed": [{"num_warps": 4}, {"num_warps": 8}],
    # Tall: of what a row and a column carry beside the product, a thread holds more for columns.
    "contrast": [
        {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 64, "GROUP": 8, "num_warps": 8, "num_stages": 2},
    ],
    "contrast_stages": [
        {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 32, "GROUP": 8, "num_warps": 8, "num_stages": 1},
    ],
    "gate": [{"BLOCK_R": 16, "BLOCK_F": 128, "num_warps": 4}, {"BLOCK_R": 16, "BLOCK_F": 256, "num_warps": 8}],
}


def candidates(kernel: str, capability: int | None) -> list[Tile]:
    """The tiles of `kernel` that suit a GPU: capability 90 for sm_90, None where it is not NVIDIA's."""
    if kernel == "attend":  # rows at one length spill with eight warps on AMD, with four and small blocks on NVIDIA
        return TILES[kernel][2:] if capability is None else TILES[kernel][:3]
    if kernel == "contrast":
        return TILES[kernel][1:] if capability is None else TILES[kernel]  # AMD's masks take more than NVIDIA's
    if kernel == "contrast_stages":
        return TILES[kernel][1:] if capability is not None and capability >= 100 else TILES[kernel]
    if kernel != "feed_forward_tma":
        return TILES[kernel]
    if capability is None or capability < 90:
        return []
    # From sm_100 on sums lie in tensor memory; reading them out takes more registers, or spills.
    return [t for t in TILES[kernel] if capability < 100 or t["maxnreg"] > 128]


class Tuned(NamedTuple):
    """What a file of MLPOOL_TILES holds. rates: by the name of a dtype."""

    tiles: dict[str, Tile]
    rates: dict[str, Rates]


RATE_FIELDS = Rates._fields[:-1]
RATED_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float32: "float32"}


def device_here() -> str:
    """The name that a tuned file carries: the current GPU's, or the CPU with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"CPU {cores} cores"


def versions_here() -> dict[str, str]:
    try:
        return {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {"torch": torch.__version__, "triton": "none"}


@lru_cache
def tuned() -> Tuned:
    """The file that MLPOOL_TILES names, read once; nothing where it is not set.

    Raises: ValueError for a file that cannot be read, is not as above, or was tuned on another device.
    """
    path = os.environ.get("MLPOOL_TILES")
    if not path:
        return Tuned({}, {})
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"MLPOOL_TILES={path} is no JSON file that can be read: {error}") from None
    return read_tuned(content, f"MLPOOL_TILES={path}")


def read_tuned(content: Any, name: str) -> Tuned:
    """A checked file; name: how errors call it. A field that a tile lacks is the default's."""
    content = _object(content, name)
    if not content.keys() & {"device", "tiles", "rates"}:
        content = {"tiles": content}
    elif "device" not in content:
        raise ValueError(f"{name} does not say its device; write it with benchmarks/tune.py")
    _known(content, {"device", "torch", "triton", "tiles", "rates"}, f"{name}: field")
    device = content.get("device")
    if device is not None and device != device_here():
        raise ValueError(
            f"{name} was tuned on {device!r}, this is {device_here()!r}; run benchmarks/tune.py here, or unset "
            "MLPOOL_TILES"
        )
    for package, version in versions_here().items():
        if content.get(package, version) != version:
            warnings.warn(
                f"{name} was tuned with {package} {content[package]}, here is {version}: tiles and rates may not be "
                "the best; run benchmarks/tune.py again",
                stacklevel=2,
            )
    kernels, rates = (_object(content.get(key, {}), f"{name}: {key!r}") for key in ("tiles", "rates"))
    _known(kernels, TILES, f"{name}: kernel")
    _known(rates, set(RATED_DTYPES.values()), f"{name}: dtype of rates")
    source = "fitted" if device is None else f"fitted for {device}"
    return Tuned(
        {kernel: _read_tile(kernel, tile, name) for kernel, tile in kernels.items()},
        {dtype: _read_rates(dtype, fields, source, name) for dtype, fields in rates.items()},
    )


def _read_tile(kernel: str, tile: Any, name: str) -> Tile:
    default, where = TILES[kernel][0], f"{name}: {kernel!r}"
    _known(_object(tile, where), default, f"{where}: field")
    for field, value in tile.items():
        if type(value) is not int or value < 1 or (field.startswith("BLOCK") and value & (value - 1)):
            kind = "a power of two" if field.startswith("BLOCK") else "a positive integer"
            raise ValueError(f"{where}: {field} must be {kind}, got {value!r}")
    return {**default, **tile}


def _read_rates(dtype: str, fields: Any, source: str, name: str) -> Rates:
    where = f"{name}: rates of {dtype}"
    _known(_object(fields, where), RATE_FIELDS, f"{where}: field")
    for field in RATE_FIELDS:
        value = fields.get(field)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {field} must be a positive number, got {value!r}")
    return Rates._make([*(float(fields[field]) for field in RATE_FIELDS), source])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}: {str(value)[:60]}")
    return value


def _known(names: Any, known: Any, what: str) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{what} {', '.join(map(repr, unknown))} is unknown; known: {', '.join(sorted(known))}")


def fitted_rates(device: torch.device) -> dict[torch.dtype, Rates]:
    """The rates of MLPOOL_TILES by compute dtype, where they are those of `device`; empty: there are none."""
    # On a machine with a GPU the file is the GPU's.
    if device.type not in ("cpu", "cuda") or (device.type == "cuda") != torch.cuda.is_available():
        return {}
    rates = tuned().rates
    return {dtype: rates[name] for dtype, name in RATED_DTYPES.items() if name in rates}


def _overrides() -> dict[str, Tile]:
    return tuned().tiles


def tile(kernel: str, hidden: int | None = None, wide: bool = False, capability: int | None = None) -> Tile:
    """The tile of `kernel`; `hidden` shrinks BLOCK_D to a small D, `wide` (float32 operands) halves its depth.

    capability: of the GPU, for a kernel whose tiles depend on it.
    """
    chosen = dict(_overrides().get(kernel) or candidates(kernel, capability)[0])
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
