"""A CUDA card that is not there: fake tensors on "cuda", Triton's own binder, compiler and launcher, no libcuda.

    with card(90) as launches:                   # sm_90
        pool = MultiLayerPool(896, 24, device="cuda", dtype=torch.bfloat16)
        ...                                      # anything that runs on a card
        gradients(output, [*pool.parameters()])  # in place of torch.autograd.grad
    launches                                     # each compiled, without spills, bound, and within a card's limits

Tensors have shapes, types, strides, devices and addresses, but no memory (`FakeTensorMode`): released sizes cost
nothing, and a tensor on the wrong device is an error as on a card. Integers and booleans have values all the same, so
that masks and offsets are read as ever; what a kernel would have written reads as zero.

`stand_in.c` takes the place of libcuda and refuses what a card refuses. A torch built without CUDA knows no CUDA device
behind autograd: GUARD gives it one. Needs a C and a C++ compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.nvidia import driver as nvidia

# Bytes of stack a thread may take. Triton before 3.7 leaves a few numbers there, of the loss's tiles above all.
SPILL = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 32
FIRST_ADDRESS = 1 << 40  # as in stand_in.c
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


class Launch(NamedTuple):
    """What reached the driver: the kernel's name, its grid and its shared memory in bytes."""

    kernel: str
    grid: tuple[int, int, int]
    shared: int


# Triton keeps a kernel it has compiled, with its launcher, for the whole process: so is the record.
_launches: list[Launch] = []
_libraries = tempfile.TemporaryDirectory(prefix="libcuda-")


# --- the driver ----------------------------------------------------------------------------------------------------


def _build(compiler: str, source: Path, library: Path, *options: str) -> None:
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library), *options], check=True)


@functools.cache
def _libcuda() -> ctypes.CDLL:
    """Built once a process, and loaded before Triton looks for the library of that name."""
    folder = Path(_libraries.name)
    include = Path(nvidia.__file__).parent / "include"
    source, library = Path(__file__).with_name("stand_in.c"), folder / "libcuda.so.1"
    _build("gcc", source, library, f"-I{include}", "-Wl,-soname,libcuda.so.1")
    if not torch.backends.cuda.is_built():
        (folder / "guard.cpp").write_text(GUARD)
        home = Path(torch.__file__).parent
        options = ("-std=c++20", f"-I{home}/include", f"-L{home}/lib", "-lc10")
        _build("g++", folder / "guard.cpp", folder / "guard.so", *options)
        ctypes.CDLL(str(folder / "guard.so"))
    with patch.dict("os.environ", TRITON_LIBCUDA_PATH=str(folder)):
        nvidia.libcuda_dirs()  # cached: what it answers now it answers always
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _stack(binary: bytes) -> int:
    """Bytes of stack that a cubin's kernels take: where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", usage)
    assert found, usage
    return sum(map(int, found))


class _Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA cards, told which device there is. Its number is its architecture."""

    def __init__(self, architecture: int) -> None:
        _libcuda()
        super().__init__()
        self.get_current_device = lambda: architecture
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(architecture, 10)
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(**{**vars(self.utils), "load_binary": self._load})

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        spilled = _stack(binary)
        assert spilled <= SPILL, f"{name} for sm_{device} spills registers to {spilled} bytes of stack"
        return nvidia.CudaUtils.instance.load_binary(name, binary, shared, device)


class _Launcher(nvidia.CudaLauncher):
    """Triton's launcher, which must reach the driver once a call."""

    def __init__(self, source: Any, metadata: Any) -> None:
        super().__init__(source, metadata)
        self.metadata = metadata

    def __call__(self, *arguments: Any) -> None:
        grid, before = arguments[:3], _libcuda().stand_in_launches()
        super().__call__(*arguments)
        # The launcher multiplies the grid's sizes as int32, and where the product is not positive it launches nothing.
        reached = _libcuda().stand_in_launches() - before
        assert reached == 1, f"{self.metadata.name} on the grid {grid}: {reached} launches reached the driver"
        _launches.append(Launch(self.metadata.name, grid, self.metadata.shared))


_driver = functools.cache(_Driver)

# --- tensors -------------------------------------------------------------------------------------------------------


class _Tensors(FakeTensorMode):
    """Fake tensors; integers and booleans have values beside them (`known`), and our ops run as on a card."""

    nested = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mlpool":
            return self._run(func, types, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and _known(args[0]) is not None:
            return _known(args[0]).item()
        if self.nested:
            return super().dispatch(func, types, args, kwargs)
        self.nested = True
        try:
            out = super().dispatch(func, types, args, kwargs)
            self._follow(func, args, kwargs, out)
        finally:
            self.nested = False
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The op's own code, whose results must be what its fake says."""
        fake = super().dispatch(func, types, args, kwargs)
        with self:
            real = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        for mine, promised in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            for what in ("shape", "dtype", "device"):
                assert getattr(mine, what) == getattr(promised, what), f"{func}: {what} of an output is not as promised"
        return real

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """The values of integer results, where those of all operands are known."""
        results = [t for t in tree_leaves(out) if isinstance(t, FakeTensor)]
        known = all(_known(t) is not None for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        if not known or any(t.dtype.is_floating_point for t in results):
            values = [None] * len(results)
        else:
            host = tree_map(_on_host, (args, kwargs))
            values = [t for t in tree_leaves(func(*host[0], **host[1])) if isinstance(t, Tensor)]
            if "empty" in func._schema.name:
                values = [v.zero_() for v in values]
        for result, value in zip(results, values, strict=True):
            result.known = value


def _known(tensor: Tensor) -> Tensor | None:
    """The values of an integer tensor, where it has any."""
    return getattr(tensor, "known", None) if isinstance(tensor, FakeTensor) else tensor


def _to_list(tensor: FakeTensor) -> list[Any]:
    """All values at once: torch reads a fake tensor's one after the other, half a minute for 70,000 offsets."""
    known = _known(tensor)
    return [element.item() for element in tensor] if known is None else known.tolist()


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return _known(value) if isinstance(value, Tensor) else value


def _address(tensor: FakeTensor) -> int:
    """Aligned like the start of an allocation, and no address of a card for a tensor that is on the host."""
    start = FIRST_ADDRESS if tensor.device.type == "cuda" else 4096
    return start + tensor.storage_offset() * tensor.element_size()


def gradients(output: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of every leaf, each the leaf's like, with ones for the output's.

    torch's engine runs the backward of a device in a thread that needs the device; here each node runs in this one.
    """
    pending: dict[Any, list[Tensor | None]] = {output.grad_fn: [torch.ones_like(output)]}
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for node in _in_order(output.grad_fn):
            grads = pending.pop(node)
            if hasattr(node, "variable"):
                found[id(node.variable)] = grads[0]
                continue
            for (after, slot), grad in _run_node(node, grads):
                inputs = pending.setdefault(after, [None] * len(after._input_metadata))
                inputs[slot] = _sum(inputs[slot], _fit(grad, after._input_metadata[slot]))
    result = [found[id(leaf)] for leaf in leaves]
    for leaf, grad in zip(leaves, result, strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    return result


def _in_order(root: Any) -> list[Any]:
    """Every node of the graph, each before those it hands gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


def _run_node(node: Any, grads: Sequence[Tensor | None]) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """The gradients that a node hands on, with the node and the slot that each is for."""
    results = getattr(node, "apply", node)(*grads)
    results = results if isinstance(results, tuple) else (results,)
    if hasattr(node, "needs_input_grad"):
        # One written in Python answers for arguments that are no tensors too; those lead nowhere.
        results = [grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        yield from zip([edge for edge in node.next_functions if edge[0] is not None], results, strict=True)
    else:
        yield from (
            (edge, grad) for edge, grad in zip(node.next_functions, results, strict=True) if edge[0] is not None
        )


def _fit(grad: Tensor | None, like: Any) -> Tensor | None:
    """As the engine does between nodes: what was broadcast is summed, and the type is that of the value."""
    return None if grad is None else grad.sum_to_size(like.shape).to(like.dtype)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Operations(TorchDispatchMode):
    """The names of torch's own operations that a card would launch something for; views and new memory are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        on_card = any(t.device.type == "cuda" for t in tree_leaves(out) if isinstance(t, Tensor))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if on_card and not view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.names.append(name)
        return out


UNTRACED = ("mlpool_kernels.fold", "mlpool_kernels.gather", "mlpool_kernels.pool", "mlpool.pooling.tokens")


@contextmanager
def card(architecture: int, traced: bool = True) -> Iterator[list[Launch]]:
    """Inside, "cuda" is a card of this architecture (80, 90, 100); yields the launches as they come.

    traced: our ops go through the dispatcher, and what they give is held to what their fakes say; False: as a user's
    own process runs them, and a batch's masks in one launch.
    """
    properties = SimpleNamespace(
        name="stand-in", total_memory=80 << 30, multi_processor_count=132,
        major=architecture // 10, minor=architecture % 10,
    )  # fmt: skip
    answers = {
        "_exchange_device": -1, "_maybe_exchange_device": -1, "current_device": 0, "is_current_stream_capturing": False,
        "get_device_properties": properties, "get_device_capability": divmod(architecture, 10),
        "is_bf16_supported": True,
    }  # fmt: skip
    _launches.clear()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", _address))
        stack.enter_context(patch.object(FakeTensor, "tolist", _to_list))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", _driver(architecture)))
        # What follows the pooler is a launch where nothing traces; these tensors only look as if something did.
        for module in ("mlpool_kernels.embed", *(() if traced else UNTRACED)):
            # By name: the package exports functions called as their modules.
            stack.enter_context(patch.object(importlib.import_module(module), "untraced", lambda tensors: True))
        stack.enter_context(_Tensors())
        yield _launches
