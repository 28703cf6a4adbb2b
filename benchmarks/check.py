"""Is all there that the steps of `make gpu` need? A line each, and one kernel compiled, run and compared.

    python benchmarks/check.py                  everything, a minute
    python benchmarks/check.py --card           the card alone, in one line where it is missing

The exit status is 1 where something is missing. Versions are those that pyproject.toml asks for.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measure import RESULTS, code, commit, no_card, no_compiler, relative_error, writable

ROOT = Path(__file__).parent.parent
# Packages, and the steps that cannot do without them.
NEEDED = {
    "torch": "every step", "triton": "every step", "numpy": "every step", "pytest": "gpu-test",
    "hypothesis": "gpu-test", "transformers": "gpu-encode, gpu-train, gpu-attention",
    "sentence-transformers": "gpu-encode, gpu-train", "safetensors": "gpu-test", "peft": "gpu-train",
    "pydantic": "gpu-test",
}  # fmt: skip
LIMIT = 1e-2  # of a bfloat16 mean over 96 rows to the same in float32


def floors() -> dict[str, str]:
    """Package -> the least version that pyproject.toml asks for, "" where it asks for any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    found = (re.match(r"([\w-]+)(?:>=([\d.]+))?", requirement.split("[")[0]) for requirement in wanted)
    return {m[1]: m[2] or "" for m in found if m and m[1] != "mlpool"}


def numbers(text: str) -> tuple[int, ...]:
    """2.11.0+cu130 -> (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def packages() -> Iterator[tuple[bool, str]]:
    """A line on each package."""
    least = floors()
    for name, steps in NEEDED.items():
        floor = least.get(name, "")
        wanted = f"{name}>={floor}" if floor else name
        try:
            found = version(name)
        except PackageNotFoundError:
            yield False, f"{name} is missing: {steps} cannot run; pip install '{wanted}'"
            continue
        good = numbers(found) >= numbers(floor)
        yield good, f"{name} {found}" + ("" if good else f" is too old for {steps}; pip install '{wanted}'")


def machine(results: Path) -> Iterator[tuple[bool, str]]:
    """A line on Python, the C compiler, the card and the folder of results."""
    python = platform.python_version()
    yield sys.version_info >= (3, 11), f"Python {python}" + ("" if sys.version_info >= (3, 11) else ": 3.11 is needed")
    compiler = no_compiler()
    yield not compiler, compiler or "a C compiler and Python.h"
    try:
        writable(results)
        yield True, f"results go to {results}"
    except SystemExit as error:
        yield False, str(error)
    if missing := no_card():
        yield False, missing
        return
    card, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    yield (
        card.major >= 8,
        f"{card.name}, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}, {free >> 30} of {total >> 30} GiB free"
        + ("" if card.major >= 8 else ": the kernels are made for sm_80 and later"),
    )


def kernel() -> tuple[bool, str]:
    """The masked mean of a few layers, compiled, run and compared with the same in float32."""
    from mlpool_kernels import reference

    import mlpool

    device = torch.device("cuda")
    torch.manual_seed(0)
    states = [torch.randn(4, 96, 320, device=device, dtype=torch.bfloat16) for _ in range(3)]
    mask = (torch.arange(96, device=device) < torch.tensor([[96], [50], [7], [1]], device=device)).long()
    begin = time.perf_counter()
    try:
        rows = mlpool.gather(states, mask, token_pooling="mean", backend="triton")
        torch.cuda.synchronize()
    except Exception as error:
        return False, f"the first kernel fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = time.perf_counter() - begin
    error = relative_error(rows.float(), reference.gather([s.float() for s in states], mask, "mean"))
    return error <= LIMIT, f"one kernel compiled and run in {seconds:.1f} s, error {error:.0e} (at most {LIMIT:.0e})"


def lines(results: Path) -> Iterator[tuple[bool, str]]:
    good = True
    for fine, text in (*machine(results), *packages()):
        good &= fine
        yield fine, text
    if good:
        yield kernel()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="only whether a card is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.card:
        if missing := no_card() or no_compiler():
            print(missing, file=sys.stderr)
        return int(bool(missing))
    print(f"mlpool {commit()}, code {code()}, MLPOOL_TILES={os.environ.get('MLPOOL_TILES', '')}")
    good = True
    for fine, text in lines(args.results):
        print(f"{'ok     ' if fine else 'MISSING'} {text}", flush=True)
        good &= fine
    if not good:
        print("not ready: see the lines that say MISSING", file=sys.stderr)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
