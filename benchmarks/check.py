"""Is all there that the steps of `make gpu` need? A line each, and one kernel compiled, run and compared.

    python benchmarks/check.py                  everything, a minute
    python benchmarks/check.py --card           the card alone, in one line where it is missing

The exit status is 1 where something is missing. Versions are those that pyproject.toml asks for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from measure import RESULTS, code, commit, no_card, no_compiler, writable

from mlpool import doctor

# Packages, and the steps that cannot do without them.
NEEDED = {
    "torch": "every step", "triton": "every step", "numpy": "every step", "pytest": "gpu-test",
    "hypothesis": "gpu-test", "transformers": "gpu-encode, gpu-train, gpu-attention",
    "sentence-transformers": "gpu-encode, gpu-train", "safetensors": "gpu-test", "peft": "gpu-train",
    "pydantic": "gpu-test",
}  # fmt: skip


def packages() -> Iterator[tuple[bool, str]]:
    """A line on each package."""
    least = {name: floor for wanted in doctor.requirements().values() for name, floor in wanted.items()}
    for name, steps in NEEDED.items():
        floor = least.get(name, "")
        if wrong := doctor.fault(name, floor):
            yield False, f"{name} {wrong} for {steps}; pip install '{name}>={floor}'"
        else:
            yield True, f"{name} {doctor.installed(name)}"


def machine(results: Path) -> Iterator[tuple[bool, str]]:
    """A line on Python, the C compiler, the card and the folder of results."""
    compiler = no_compiler()
    for found in doctor.python():
        yield found.state == doctor.OK, found.text
    yield not compiler, compiler or "a C compiler and Python.h"
    try:
        writable(results)
        yield True, f"results go to {results}"
    except SystemExit as error:
        yield False, str(error)
    if missing := no_card():
        yield False, missing
        return
    for found in doctor.device():
        yield found.state == doctor.OK, found.text


def lines(results: Path) -> Iterator[tuple[bool, str]]:
    good = True
    for fine, text in (*machine(results), *packages()):
        good &= fine
        yield fine, text
    if good:  # the first kernel, compiled, run and compared
        found = doctor.tried("one kernel", lambda: doctor.gathers(torch.device("cuda"), torch.bfloat16))
        yield found.state == doctor.OK, found.text


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
