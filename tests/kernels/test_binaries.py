"""Every kernel at every tile compiles to a real binary, without spills and within shared memory. Needs no GPU.

The launchers run with recorders in place of the kernels; what they would have launched is compiled for NVIDIA sm_80,
sm_90, sm_100 and AMD gfx942. Runs in a process of its own: MLPOOL_LOAD_TRITON=1, no TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("MLPOOL_LOAD_TRITON") != "1" or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs by `make test` in its own process: MLPOOL_LOAD_TRITON=1 pytest ...", allow_module_level=True)

triton = pytest.importorskip("triton")
from mlpool_kernels import tiles  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# By name: the package exports functions called as their modules.
attend, feed_forward, gather, mix = MODULES = [
    importlib.import_module(f"mlpool_kernels.{name}") for name in ("attend", "feed_forward", "gather", "mix")
]
KILOBYTE = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KILOBYTE),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KILOBYTE),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KILOBYTE),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KILOBYTE),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.bool: "i1"}


@dataclass
class Recorder:
    """Stands where a kernel stands and keeps what it is launched with; a grid that no GPU takes is an error."""

    kernel: Any
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def __getitem__(self, grid):
        assert grid[0] < 2**31, grid
        assert all(0 < n < 65_536 for n in grid[1:]), grid
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


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
    launch = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    binary = triton.compile(_source(kernel, args, options), target=machine, options=launch)
    assert binary.metadata.shared <= limit, f"{binary.metadata.shared} bytes of shared memory, {limit} there are"
    assert _spills(binary, machine.backend) == 0, "registers spill to memory"


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


def _launch(name: str, dtype: torch.dtype, layers: int, hidden: int, latents: int, heads: int) -> None:
    """Call the launcher of one kernel on small data of the given sizes."""
    batch, tokens, width, columns = 2, 32, hidden, heads * latents
    states = [torch.zeros(batch, tokens, hidden, dtype=dtype) for _ in range(layers)]
    rows = torch.tensor([tokens - 1, 2 * tokens - 1])
    starts, ends, count = rows - tokens + 1, rows + 1, rows * 0 + tokens
    keep = torch.ones(batch * tokens, dtype=torch.bool)
    vector, bias = torch.zeros(hidden), torch.zeros(2 * width)
    x0 = torch.zeros(batch, layers, hidden, dtype=dtype)
    scores = torch.zeros(batch, layers, columns, dtype=dtype)
    z = torch.zeros(latents, hidden)
    both = torch.zeros(batch, latents, 2 * width, dtype=dtype)
    if name in ("mean", "last"):
        gather._forward(states, starts, ends, rows, count, keep, name == "mean", "triton")
    elif name == "gather_backward":
        gather._backward(x0, states[0].shape, starts, ends, rows, count, keep, True, "triton")
    elif name in ("attend", "norm"):
        queries = torch.zeros(columns, hidden, dtype=dtype) if name == "attend" else None
        attend.attend_one_launch(states, rows, torch.zeros(layers, hidden), vector, vector, queries, dtype)
        attend.attend_one_launch([x0], None, None, vector, vector, queries, dtype)
    elif name == "softmax":
        attend.softmax_(scores, keep.view(batch, tokens)[:, :layers], True)
        attend.softmax_backward_(scores, scores, True)
    elif name == "mix":
        values = torch.zeros(batch * layers, heads, hidden, dtype=dtype)
        mix._mix_triton(scores, values, z, vector, vector, True)
    elif name.startswith("feed_forward"):
        normed, weight = (torch.zeros(*rows, hidden, dtype=dtype) for rows in ((batch, latents), (2 * width,)))
        feed_forward._feed_forward_triton(normed, weight, bias, name == "feed_forward_tma")
    else:
        feed_forward.gate_mean(both, True)
        feed_forward.gate_backward(both, torch.zeros(batch, width), True, True)


def _record(monkeypatch, name: str, tile: dict[str, int] | None, *sizes: Any) -> list[Any]:
    launches: list[Any] = []
    for module in MODULES:
        for attribute in [a for a in vars(module) if a.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Recorder(getattr(module, attribute), launches))
    monkeypatch.setattr(gather, "use_triton", lambda *_: True)
    if tile is not None:
        monkeypatch.setattr(tiles, "_overrides", lambda: {name: tile})
    _launch(name, *sizes)
    assert launches
    return launches


CANDIDATES = [
    pytest.param(name, tile, target, id=f"{name}-{i}-{target}")
    for target, (machine, _) in TARGETS.items()
    for name in tiles.TILES
    for i, tile in enumerate(tiles.candidates(name, machine.arch if machine.backend == "cuda" else None))
]


@pytest.mark.parametrize(("name", "tile", "target"), CANDIDATES)
def test_every_tile_compiles_without_spills(monkeypatch, name, tile, target):
    for kernel, args, options in _record(monkeypatch, name, tile, torch.bfloat16, 24, 896, 64, 8):
        _compile(kernel, args, options, target)


SIZES = {
    "float32": (torch.float32, 24, 896, 64, 8),
    "released": (torch.bfloat16, 32, 4096, 768, 32),
    "many layers": (torch.float16, 80, 1536, 100, 8),
    "small": (torch.float16, 1, 64, 1, 1),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", tiles.TILES)
def test_default_tile_compiles_at_other_sizes(monkeypatch, name, sizes):
    dtype, _, _, latents, heads = SIZES[sizes]
    if name == "feed_forward_tma" and dtype == torch.float32:
        return  # read by pointers
    if (name == "mix" and latents > 128) or (name == "attend" and latents * heads > 1024):
        return  # the cost model never launches it there
    for kernel, args, options in _record(monkeypatch, name, None, *SIZES[sizes]):
        _compile(kernel, args, options, "sm_90")


@pytest.mark.parametrize("name", ["feed_forward", "feed_forward_tma", "gate"])
def test_more_texts_than_a_grid_is_high(monkeypatch, name):
    """100,000 texts of 8 latents at D=64, within the limits that `Recorder` checks."""
    launches: list[Any] = []
    for attribute in ("_feed_forward_kernel", "_gate_kernel"):
        monkeypatch.setattr(feed_forward, attribute, Recorder(getattr(feed_forward, attribute), launches))
    normed, bias = torch.empty(100_000, 8, 64, dtype=torch.bfloat16), torch.empty(128)
    if name == "gate":
        feed_forward.gate_mean(torch.empty(100_000, 8, 128, dtype=torch.bfloat16), True)
        feed_forward.gate_backward(torch.empty(100_000, 8, 128, dtype=torch.bfloat16), torch.empty(1), True, True)
    else:
        weight = torch.empty(128, 64, dtype=torch.bfloat16)
        feed_forward._feed_forward_triton(normed, weight, bias, name == "feed_forward_tma")
    assert launches
