"""`mlpool doctor`: what is here, what works, and how to get what is missing. `make gpu-check` asks the same of a card.

Every question is a function that yields findings as it answers them, so that a slow or failing one hides no other. At
the top it needs Python alone: a package that is missing is a finding, not an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .version import __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OK, NOTE, MISSING, WRONG = "ok", "-", "missing", "WRONG"
ABSENT = "is missing"
# What each extra brings, and the commands that need it.
EXTRAS = {
    "triton": "kernels on a GPU",
    "st": "embedders: mlpool encode, calibrate, export",
    "train": "mlpool init, mine, train, fit, merge, import-released",
    "eval": "mlpool eval, compare, layers; with train: mlpool study",
    "flash": "packed attention with dropout or soft-capping on a GPU",
}
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
LEAST_CARD = 8


class Finding(NamedTuple):
    """One answer. state: OK; NOTE, which nothing here needs; MISSING, which something does; WRONG, which works wrong.

    get: what to type for what is not there, or "".
    """

    state: str
    text: str
    get: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what is installed, what works (kernels, attention, packing, each by a small test) and how to get what is "
        "missing. Takes seconds, writes nothing, asks no network. The exit status is 1 where something works wrong or "
        "something is missing that this machine needs."
    )


def run(args: argparse.Namespace) -> int:
    bad = False
    for title, findings in sections():
        print(title)
        for found in findings:
            print(f"  {found.state:<8}{found.text}", flush=True)
            if found.get:
                print(f"  {'':<8}get it: {found.get}", flush=True)
            bad |= found.state in (MISSING, WRONG)
    print("not all is well: see the lines that say missing or WRONG" if bad else "all that is needed works")
    return int(bad)


def sections() -> Iterator[tuple[str, Iterator[Finding]]]:
    """Titles with what is found below them; what a section needs is imported when it is asked."""
    yield f"mlpool {__version__} on {platform.system()} {platform.machine()}", python()
    yield "packages", packages()
    if installed("torch"):
        yield "device", device()
        yield "compiler, for Triton's launchers", compiler()
        yield "kernels, against plain torch in float64", kernels()
    if installed("torch") and installed("transformers"):
        yield "attention of a tiny Llama: causal, in both directions, packed", attention()


# --- what is installed ------------------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    yield Finding(OK, f"Python {platform.python_version()}, {sys.executable}")  # below 3.11 there is no tomllib


def requirements() -> dict[str, dict[str, str]]:
    """Extra ("" for what mlpool always needs) -> package -> the least version, "" where any does.

    From pyproject.toml in a checkout, which need not be installed, else as installed; {} where it is neither.
    """
    project = Path(__file__).parent.parent / "pyproject.toml"
    with contextlib.suppress(FileNotFoundError, KeyError):
        content = tomllib.loads(project.read_text(encoding="utf8"))["project"]
        if content["name"] == "mlpool":
            lists = {"": content["dependencies"], **content["optional-dependencies"]}
            return {extra: dict(filter(None, map(_requirement, lines))) for extra, lines in lists.items()}
    found: dict[str, dict[str, str]] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("mlpool") or ():
            extra = re.search(r"""extra == ["']([\w-]+)""", line)
            found.setdefault(extra[1] if extra else "", {}).update(filter(None, [_requirement(line)]))
    return found


def _requirement(line: str) -> tuple[str, str] | None:
    """transformers>=5.17 -> ("transformers", "5.17"); None of mlpool itself with other extras."""
    match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", line)
    return None if match is None or match[1] == "mlpool" else (match[1], match[2] or "")


def numbers(text: str) -> tuple[int, ...]:
    """2.11.0+cu130 -> (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def installed(name: str) -> str | None:
    """The version of a package, None where it is not here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fault(name: str, least: str) -> str:
    """What is wrong with a package of which at least this version is needed: "", ABSENT or "… is too old"."""
    found = installed(name)
    if found is None:
        return ABSENT
    return "" if numbers(found) >= numbers(least) else f"{found} is too old"


def packages() -> Iterator[Finding]:
    """What mlpool always needs, then a line an extra."""
    wanted = requirements()
    for name, least in (wanted.get("") or {"torch": ""}).items():
        if wrong := fault(name, least):
            yield Finding(MISSING, f"{name} {wrong}", f"pip install '{name}{least and '>='}{least}'")
        else:
            yield Finding(OK, f"{name} {installed(name)}")
    for extra, what in EXTRAS.items():
        if extra in wanted:
            yield _extra(extra, what, wanted[extra])


def _extra(extra: str, what: str, wanted: Mapping[str, str]) -> Finding:
    faults = {name: fault(name, least) for name, least in wanted.items()}
    if not any(faults.values()):
        return Finding(OK, f"{extra} ({what}): {', '.join(f'{name} {installed(name)}' for name in wanted)}")
    # What was never asked for is a note; an old version is what an upgrade of mlpool left behind.
    old = any(wrong not in ("", ABSENT) for wrong in faults.values())
    absent = ", ".join(name for name, wrong in faults.items() if wrong == ABSENT)
    lacks = "; ".join(
        [*([f"{absent} missing"] if absent else []), *(f"{n} {w}" for n, w in faults.items() if w not in ("", ABSENT))]
    )
    get = "pip install flash-attn --no-build-isolation" if extra == "flash" else f"pip install 'mlpool[{extra}]'"
    return Finding(MISSING if old else NOTE, f"{extra} ({what}): {lacks}", get)


# --- the machine ------------------------------------------------------------------------------------------------------


def no_card() -> str:
    """What is missing for CUDA, or ""."""
    import torch

    if torch.version.cuda is None:
        return f"there is no CUDA GPU for torch {torch.__version__}, which is built without CUDA"
    return "" if torch.cuda.is_available() else "there is no CUDA GPU here: torch.cuda.is_available() is False"


def no_compiler() -> str:
    """What Triton lacks to build the launcher of its first kernel, or ""."""
    found = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if found is None or shutil.which(found) is None:
        return f"Triton needs a C compiler and finds {found or 'no gcc and no clang'}: install gcc, or set CC to one"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.is_file() else f"Triton needs {header}: install python3-dev, or a Python with its headers"


def device() -> Iterator[Finding]:
    import torch

    if missing := no_card():
        if shutil.which("nvidia-smi"):
            yield Finding(MISSING, f"{missing}, but nvidia-smi is", "what pytorch.org/get-started says for its driver")
        else:
            yield Finding(NOTE, f"{missing}; all runs on the CPU, in plain torch")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Finding(OK, f"CPU, {cores} cores")
        return
    card, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    good = card.major >= LEAST_CARD or bool(torch.version.hip)
    yield Finding(
        OK if good else MISSING,
        f"{card.name}, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}, {free >> 30} of {total >> 30} GiB free"
        + ("" if good else f": the kernels are made for sm_{LEAST_CARD}0 and later"),
    )


def compiler() -> Iterator[Finding]:
    if not (missing := no_compiler()):
        yield Finding(OK, "a C compiler and Python.h")
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev" if "Python.h" in missing else "gcc"
    needed = not no_card()
    text = missing if needed else f"{missing} (not needed without a GPU)"
    yield Finding(MISSING if needed else NOTE, text, f"apt install {package}")


# --- what works -------------------------------------------------------------------------------------------------------


def tried(what: str, test: Callable[[], tuple[bool, str]]) -> Finding:
    """A finding of a test that says whether it is right and how far off; its error is one too."""
    begin = time.perf_counter()
    try:
        good, text = test()
    except Exception as error:
        return Finding(WRONG, f"{what} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Finding(OK if good else WRONG, f"{what}: {text}, {time.perf_counter() - begin:.1f} s")


def relative_error(value: Tensor, truth: Tensor, least: float = 1e-30) -> float:
    """‖value − truth‖ / ‖truth‖; NaN where value holds one. least: the smallest norm to divide by."""
    return float((value.to(truth.dtype) - truth).norm() / truth.norm().clamp(min=least))


def compared(ours: Tensor, plain: Tensor, truth: Tensor, times: int = 2) -> tuple[bool, str]:
    """At most twice the error of plain torch in the same dtype; as much as the dtype resolves is no error."""
    import torch

    error = relative_error(ours, truth)
    allowed = max(times * relative_error(plain, truth), torch.finfo(plain.dtype).eps)
    return error <= allowed, f"error {error:.0e} (at most {allowed:.0e})"


def kernels() -> Iterator[Finding]:
    """The rows of all layers, a pool with its gradients, the loss: Triton's on a card, plain torch's on a CPU."""
    import torch

    place = torch.device("cpu" if no_card() else "cuda")
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    if place.type == "cuda" and installed("triton") is None:
        yield Finding(MISSING, "Triton, which the kernels are written in", "pip install 'mlpool[triton]'")
    yield tried(f"gather, {place.type}", lambda: gathers(place, dtype))
    yield tried("pool with its gradient", lambda: pools(place, dtype))
    yield tried("contrast", lambda: contrasts(place, dtype))


def gathers(place: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """The masked mean of a few layers, run and compared."""
    import torch
    from mlpool_kernels import reference

    from .pooling import gather

    torch.manual_seed(0)
    states = [torch.randn(4, 96, 320, device=place).to(dtype) for _ in range(3)]
    mask = (torch.arange(96, device=place) < torch.tensor([[96], [50], [7], [1]], device=place)).long()
    truth = reference.gather([s.double() for s in states], mask, "mean")
    plain = reference.gather([s.float() for s in states], mask, "mean").to(dtype)
    return compared(gather(states, mask, token_pooling="mean"), plain, truth)


def pools(place: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """A small pool over four layers; the gradient of its value matrix, which all that lies behind it enters."""
    import torch
    from mlpool_kernels import reference

    from .pooling import MultiLayerPool

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_latents": 16, "num_heads": 4, "head_dim": 32, "residual": False}
    pool = MultiLayerPool(128, 4, token_pooling="mean", device=place, dtype=dtype, **sizes)
    states = [torch.randn(4, 24, 128, device=place).to(dtype) for _ in range(5)]  # the embedding's first
    mask = torch.ones(4, 24, dtype=torch.long, device=place)
    direction = torch.randn(4, 128, device=place)
    gradients = []
    for kind in (None, dtype, torch.float64):
        parameters = {n: p.detach().to(kind or dtype).requires_grad_() for n, p in pool.named_parameters()}
        if kind is None:
            out, value = pool(states, mask), pool.get_parameter("value_weight")
        else:
            given = [s.to(kind) for s in states[1:]]
            out = reference.multi_layer_pool(given, mask, parameters, sizes["num_heads"], "mean")
            value = parameters["value_weight"]  # type: ignore[assignment]
        (out * direction.to(out.dtype)).sum().backward()
        assert value.grad is not None
        gradients.append(value.grad)
    ours, plain, right = gradients
    return compared(ours, plain, right, times=3)


def contrasts(place: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """InfoNCE of 32 rows over 96 others."""
    import torch
    import torch.nn.functional as F
    from mlpool_kernels import contrast

    torch.manual_seed(0)
    rows, others = (torch.randn(n, 128, device=place).to(dtype) for n in (32, 96))
    partners = torch.arange(32, device=place)

    def plain(rows: Tensor, others: Tensor) -> Tensor:
        scores = F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).T / 0.05
        return F.cross_entropy(scores, partners, reduction="none")

    ours = contrast(rows, others, partners, temperature=0.05)[0]
    return compared(ours, plain(rows, others), plain(rows.double(), others.double()))


def attention() -> Iterator[Finding]:
    """Each backend of transformers, by the self-tests that `bidirectional` and `pack` run on any model."""
    import torch

    place = torch.device("cpu" if no_card() else "cuda")
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    for backend in BACKENDS:
        if backend == "flash_attention_2" and (place.type == "cpu" or installed("flash-attn") is None):
            yield Finding(NOTE, f"{backend}: needs a GPU and flash-attn; sdpa and packing serve without")
        elif backend == "flex_attention" and place.type == "cpu":
            yield Finding(NOTE, f"{backend}: not tried, on a CPU it is compiled for minutes; sdpa serves")
        else:
            yield tried(backend, lambda backend=backend: attends(backend, place, dtype))  # type: ignore[misc]


def attends(backend: str, place: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """A random model of two layers, checked as it is, in both directions, and packed; each check raises."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from .attention import bidirectional, check_attention, pack

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = backend
    model: Any = LlamaModel(config)
    model.to(place, dtype).eval()
    causal = check_attention(model, "causal")
    bidirectional(model)
    both = check_attention(model, "bidirectional")
    pack(model)
    check_attention(model, "bidirectional")
    return True, f"padding changes {max(causal.padding_error, both.padding_error):.0e}"
