"""What the tables of a report are made of, as plain values: cells, lines drawn in them, rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

WIDTH = 200  # pixels, of a drawn line


@dataclass(frozen=True)
class Line:
    """A value on a scale, drawn beside its number; places in pixels.

    zero: where the baseline stands. cut: "low", "high", the ends of the interval that leave the scale. dots: of the
    seeds. solid: a difference is shown.
    """

    at: float
    zero: float
    interval: tuple[float, float] | None
    cut: Sequence[str]
    dots: Sequence[float]
    solid: bool

    @classmethod
    def on(
        cls, scale: tuple[float, float], value: float, zero: float, interval: tuple[float, float] | None,
        dots: Sequence[float] = (), solid: bool = True,
    ) -> Self:  # fmt: skip
        """On a scale from its first number to its second."""
        first, last = scale

        def place(x: float) -> float:
            return round(WIDTH * min(max((x - first) / (last - first), 0), 1), 1)

        ends, cut = None, []
        if interval:
            ends = place(interval[0]), place(interval[1])
            cut = ["low"] * (interval[0] < first) + ["high"] * (interval[1] > last)
        return cls(place(value), place(zero), ends, cut, [place(x) for x in dots], solid)


@dataclass
class Cell:
    """spread: what stands small behind the text. shade: 0 to 1, how deep its colour is. mark, word: "▲", "higher".

    value: by which a table is sorted, instead of the text. told: what is said of the cell when it is pointed at.
    """

    text: str
    spread: str = ""
    classes: str = ""
    shade: float | None = None
    mark: str = ""
    word: str = ""
    value: float | None = None
    told: str = ""
    line: Line | None = None


@dataclass
class Row:
    name: str
    cells: list[Cell]


@dataclass
class Table:
    """name: what it shows, for those who hear the page."""

    name: str
    header: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    caption: str = ""

    @classmethod
    def plain(cls, name: str, lines: Sequence[Sequence[str]], caption: str, classes: str = "") -> Self:
        """Of a header and lines of text; classes "text": of words, not of numbers."""
        rows = [Row(label, [Cell(cell, classes=classes) for cell in cells]) for label, *cells in lines[1:]]
        return cls(name, lines[0], rows, caption)
