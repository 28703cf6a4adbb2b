"""What several commands ask alike: where a model is, on which device, in which precision, how long texts may be.

Needs nothing but Python until a value is given, so that help and mistyped names cost no import.
"""

import argparse
import difflib
import os
from pathlib import Path

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def add_device(parser: argparse.ArgumentParser, default: str = "a GPU where there is one") -> None:
    parser.add_argument("--device", type=device, help=f"say cpu or cuda:1 (default: {default})")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto is as saved (default)")


def add_max_seq_length(parser: argparse.ArgumentParser, default: str = "the model's own limit") -> None:
    parser.add_argument(
        "--max-seq-length", type=positive, metavar="TOKENS",
        help=f"texts are cut there, BOS and EOS counted (default: {default})",
    )  # fmt: skip


def device(name: str) -> str:
    """The name of a device that torch has here; argparse says what is wrong with any other."""
    import torch

    try:
        usable = torch.empty(0, device=name).device.type != "meta"
        reason = "holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable, reason = False, str(error).partition("\n")[0]
    if not usable:
        raise argparse.ArgumentTypeError(f"{name!r} is no device here ({reason}); expected cpu, cuda, cuda:1, mps, …")
    return name


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def names(text: str) -> list[str] | None:
    """What stands between commas; None for nothing."""
    return [name.strip() for name in text.split(",") if name.strip()] or None


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and of how many, as torchrun says."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world}: expected 0 <= RANK < WORLD_SIZE, as torchrun sets them")
    return rank, world


def check_place(name: str) -> None:
    """A local path that is not there is an error here; a name with one slash may be on the Hub.

    Raises:
        FileNotFoundError: no such folder (the nearest names). NotADirectoryError: a file.
    """
    path = Path(name)
    too_long = len(name) > 4096 or max(map(len, name.encode(errors="replace").split(b"/"))) > 255
    if "\0" in name or not name.strip() or too_long:
        raise ValueError(f"{name[:80]!r} is no name of a model; pass a folder or a Hub name")
    if path.is_dir():
        return
    if path.is_file():
        raise NotADirectoryError(f"{name} is a file; pass the folder of a model, or a Hub name")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {name}{near(path)}")


def near(path: Path) -> str:
    """The names beside a missing path that are most like it."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, siblings, n=3)
    return f" (near it: {', '.join(found)})" if found else ""
