"""What a person sees of long work and its results: progress bars, aligned tables, figures. One way for all commands."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import replacing
from .version import need

if TYPE_CHECKING:
    from tqdm import tqdm

# Okabe and Ito: told apart by the colour-blind, and by their markers in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
DPI = 150


def progress(what: str, unit: str, total: int | None = None, shown: bool | None = True, **options: Any) -> "tqdm":
    """A bar on stderr, as a context or around an iterable: `with progress("encode", "text", 9) as bar: bar.update(3)`.

    Args:
        total: None where it is not known. shown: None for only where stderr is a terminal; True, unless TQDM_DISABLE
            is set, as of any bar. options: of tqdm.
    """
    from tqdm.auto import tqdm

    disable = {} if shown else {"disable": None if shown is None else True}
    return tqdm(total=total, desc=what, unit=f" {unit}", file=sys.stderr, **disable, **options)


def aligned(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of text, two spaces between columns. left: how many columns are words; the others are numbers."""
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first line its header."""
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([header, "|" + " --- |" * len(lines[0]), *body])


def shorten(value: Any, length: int = 60) -> str:
    """A value as a message shows it: its `repr`, cut to `length` characters."""
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def plain(name: str) -> str:
    """A name as a message shows it: itself, or its `repr`, cut, where it is long or not all of it prints."""
    return name if name.isprintable() and len(name) <= 40 else shorten(name, 40)


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first names, and how many more there are."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, outside pyplot: no display, nothing global."""
    module = need("matplotlib.figure", "plots need matplotlib: pip install 'mlpool[eval]'")
    return module.Figure(figsize=(width, height), layout="constrained")


def save_figure(fig: Any, path: str | Path) -> None:
    """Whole or not at all, in the format of the name's ending."""
    with replacing(path) as new:
        fig.savefig(new, dpi=DPI)
