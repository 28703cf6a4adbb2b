"""Every kernel at every tile compiles to a real binary, without spills and within shared memory. Needs no GPU.

The launchers run with recorders in place of the kernels; what they would have launched is compiled for NVIDIA sm_80,
sm_90, sm_100 and AMD gfx942. Runs in a process of its own: MLPOOL_LOAD_TRITON=1, no TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("MLPOOL_LOAD_TRITON") != "1" or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs by `make test` in its own process: MLPOOL_LOAD_TRITON=1 pytest ...", allow_module_level=True)

triton = pytest.importorskip("triton")
from launches import Sizes, feed_forward, record  # noqa: E402
from mlpool_kernels import tiles  # noqa: E402
from mlpool_kernels.plan import MIX_SCORES  # noqa: E402
from mlpool_kernels.runtime import power_of_2  # noqa: E402
from stand_in import SPILL  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

KILOBYTE = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KILOBYTE),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KILOBYTE),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KILOBYTE),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KILOBYTE),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(v) for v in value)
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, feed_forward.TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What the launcher's arguments would be compiled as, specialised as Triton does at a launch."""
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name] = _type(value)
        if isinstance(value, tuple):
            attributes |= {(i, j): aligned for j in range(len(value))}
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = aligned
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def _compile(kernel, args, options, target: str) -> None:
    machine, limit = TARGETS[target]
    launch = {k: v for k, v in options.items() if k in ("num_warps", "num_stages", "maxnreg")}
    binary = triton.compile(_source(kernel, args, options), target=machine, options=launch)
    assert binary.metadata.shared <= limit, f"{binary.metadata.shared} bytes of shared memory, {limit} there are"
    assert _spills(binary, machine.backend) <= SPILL, "registers spill to memory"


def _spills(binary: Any, backend: str) -> int:
    if backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", binary.asm["amdgcn"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ["PYTEST_TMP"]) / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack = re.findall(r"STACK:(\d+)", usage)
    assert stack, usage
    return sum(int(s) for s in stack)


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


CANDIDATES = [
    pytest.param(name, tile, target, id=f"{name}-{i}-{target}")
    for target, (machine, _) in TARGETS.items()
    for name in tiles.TILES
    for i, tile in enumerate(tiles.candidates(name, machine.arch if machine.backend == "cuda" else None))
]


@pytest.mark.parametrize(("name", "tile", "target"), CANDIDATES)
def test_every_tile_compiles_without_spills(monkeypatch, name, tile, target):
    for kernel, _, args, options in record(monkeypatch, name, tile, Sizes(torch.bfloat16, 24, 896, 64, 8)):
        _compile(kernel, args, options, target)


SIZES = {
    "default": Sizes(torch.bfloat16, 24, 896, 16, 8),
    "float32": Sizes(torch.float32, 24, 896, 64, 8),
    "released": Sizes(torch.bfloat16, 32, 4096, 768, 32),
    "many layers": Sizes(torch.float16, 80, 1536, 100, 8),
    "small": Sizes(torch.float16, 1, 64, 1, 1),
    "taps": Sizes(torch.bfloat16, 1, 896, 64, 8, batch=1, tokens=8192),
}


def launched(name: str, sizes: str) -> bool:
    """Whether the kernel is ever launched at these sizes."""
    dtype, keys, _, latents, heads, *_ = SIZES[sizes]
    if name == "feed_forward_tma" and dtype == torch.float32:
        return False  # read by pointers
    if sizes == "taps" and name not in ("mean", "unit_mean", "last", "gather_backward", "select"):
        return False  # one layer's rows are gathered there, and that is all
    if (name.startswith("mix") and latents > 128) or (name.startswith("attend") and latents * heads > 1024):
        return False  # the cost model never does
    return name != "mix_backward" or power_of_2(keys) * power_of_2(latents) <= MIX_SCORES  # as `plan.by_heads`


@pytest.mark.parametrize(("name", "sizes"), [(n, s) for n in tiles.TILES for s in SIZES if launched(n, s)])
def test_default_tile_compiles_at_other_sizes(monkeypatch, name, sizes):
    for kernel, _, args, options in record(monkeypatch, name, None, SIZES[sizes]):
        _compile(kernel, args, options, "sm_90")


def test_descriptors_of_more_texts_than_a_grid_is_high(monkeypatch):
    sizes = Sizes(torch.bfloat16, 1, 64, 8, 1, batch=100_000, tokens=1)
    for launch in record(monkeypatch, "feed_forward_tma", None, sizes):
        assert launch.grid[0] < 2**31
        assert all(0 < size < 65_536 for size in launch.grid[1:])
