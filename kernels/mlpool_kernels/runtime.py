"""Where kernels can run: Triton's presence, its interpreter, and the choice between Triton and plain torch.

Triton is optional. Without it the decorator below leaves the kernels as plain functions that are never
called, so the files import everywhere and the torch path serves.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "torch")

triton: Any = None
tl: Any = None
# Triton takes a third of a second to import: only where it can run, or where its kernels are to be compiled.
# Asking whether torch was built for a GPU, not whether one is there, keeps the process free to fork.
if HAS_TRITON and (INTERPRETED or torch.backends.cuda.is_built() or os.environ.get("MLPOOL_LOAD_TRITON") == "1"):
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]  # noqa: F401


def jit(function: Any) -> Any:
    """`triton.jit` where Triton is loaded, else the function itself, never to be called."""
    return triton.jit(function) if triton is not None else function


def use_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Whether `backend` means the Triton kernels for these tensors (None is passed over), which lie together.

    "auto": on a GPU with Triton installed, for float32 and less; the kernels accumulate in float32, so float64 is
    torch's. "triton": always, or an error that says what is missing.

    Raises:
        ValueError: an unknown backend, or "triton" for float64, or for CPU tensors outside the interpreter.
        ModuleNotFoundError: "triton" where Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return False
    given = [t for t in tensors if t is not None]
    double = any(t.dtype == torch.float64 for t in given)
    if backend == "auto":
        return all(t.is_cuda for t in given) and triton is not None and not double
    if not HAS_TRITON:
        raise ModuleNotFoundError('backend="triton" needs Triton: pip install "triton>=3.6", or use backend="torch"')
    if double:
        raise ValueError(
            'backend="triton" accumulates in float32, got float64; use backend="auto" or "torch", which compute '
            "float64 in torch"
        )
    elsewhere = next((t.device for t in given if not t.is_cuda), None)
    if elsewhere is not None and not INTERPRETED:
        raise ValueError(
            f'backend="triton" needs CUDA tensors, got {elsewhere}; use backend="auto" or "torch", or set '
            "TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )
    return True


def direct(tensors: Iterable[Tensor | None]) -> bool:
    """Whether an op may be called as a plain function: nothing traces it and nothing needs a gradient.

    Spares the dispatcher around a custom op, which on a GPU stands before every launch.
    """
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def untraced(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing traces, wraps or transforms what runs on these tensors.

    An op may then be an autograd function of its own: what a registered op adds for tracing takes the host longer than
    the launches of a small pool.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """How `tl.dot` multiplies operands of `dtype`.

    PRECISION follows torch's own switch for float32 products. UPCAST works around Triton's interpreter, which
    multiplies the bit patterns of bfloat16 operands.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED and dtype == torch.bfloat16}


def product_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, H, a] times weight [H, a, b], head by head -> [N, H, b], contiguous."""
    out = x.new_empty(x.shape[0], x.shape[1], weight.shape[2])
    if x.is_cuda:
        torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
        return out
    # A CPU's product of rows that lie H·a apart takes twice as long as copying them together first (measured).
    return out.copy_(torch.bmm(x.transpose(0, 1).contiguous(), weight).transpose(0, 1))


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over `x` are kept in: float32, or float64 of float64."""
    return torch.promote_types(x.dtype, torch.float32)


def capability(x: Tensor) -> int | None:
    """Of an NVIDIA GPU, 90 for sm_90; None of another's. The interpreter does as sm_90."""
    if not x.is_cuda:
        return 90
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def device_memory(device: torch.device) -> int:
    """Total memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
