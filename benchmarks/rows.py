"""Rows that are on disk as soon as they are measured, and runs that go on where a kill or a time limit cut them."""

from __future__ import annotations

import csv
import gc
import io
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import START, Row, Skipped, is_lost, progress


class Rows:
    """A CSV file in which every row is safe as soon as it is measured, and from which a run is taken up again.

    Rows measured together, to be compared, are added together and count together: `part` says 1/3, 2/3, 3/3. A new
    column rewrites the file beside itself and replaces it. What a kill left unfinished is dropped on
    opening. Rows of another device, code, tiles or versions stay in the file and do not count.

    Args:
        path: made with the first row.
        facts: columns of every row; a row counts where all but `VARYING` are equal to these.
        again: drop the counted rows that failed or are wrong, to be measured again.
    """

    VARYING = ("commit", "load", "date")

    def __init__(self, path: Path, facts: Row, again: bool = False) -> None:
        self.path, self.facts = path, {name: _cell(value) for name, value in facts.items()}
        self._same = {name: value for name, value in self.facts.items() if name not in self.VARYING}
        self._lines: list[dict[str, str]] = []
        self._columns: list[str] = []
        if path.is_file():
            self._open(again)

    def _open(self, again: bool) -> None:
        whole, newline, torn = self.path.read_text(encoding="utf8").rpartition("\n")
        reader = csv.DictReader(io.StringIO(whole + newline), restval="")
        read = list(reader)
        self._columns = list(reader.fieldnames or ())
        groups = [group for group in _whole_groups(read) if not (again and any(map(self._failed, group)))]
        self._lines = [line for group in groups for line in group]
        if torn or len(self._lines) < len(read):
            self._rewrite()
        counted = len(self.all)
        if counted:
            progress(f"{self.path.name}: {counted} rows are there and are not measured again")
        if others := len(self._lines) - counted:
            progress(f"{self.path.name}: {others} rows of other code, versions, tiles or devices stay, uncounted")

    def _counts(self, line: Mapping[str, str]) -> bool:
        return all(line.get(name, "") == value for name, value in self._same.items())

    def _failed(self, line: Mapping[str, str]) -> bool:
        return self._counts(line) and line.get("green") == "False"

    @property
    def all(self) -> list[Row]:
        """The rows that count, those of earlier runs too, in the order of the file; empty cells are left out."""
        return self.of()

    def of(self, **key: Any) -> list[Row]:
        """The rows that count and have these values."""
        wanted = {name: _cell(value) for name, value in key.items()}
        lines = [line for line in self._lines if all(line.get(name, "") == value for name, value in wanted.items())]
        return [parsed(line) for line in lines if self._counts(line)]

    def has(self, **key: Any) -> bool:
        return bool(self.of(**key))

    def add(self, *group: Row) -> None:
        """Write rows that were measured together; on disk when this returns."""
        lines = [
            {name: _cell(value) for name, value in row.items()} | self.facts | {"part": f"{i}/{len(group)}"}
            for i, row in enumerate(group, 1)
        ]
        self._lines += lines
        columns = list(dict.fromkeys([*self._columns, *(name for line in lines for name in line)]))
        if columns != self._columns:
            self._columns = columns
            self._rewrite()
            return
        with self.path.open("a", encoding="utf8", newline="") as file:
            _write_lines(file, self._columns, lines)

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".writing")
        with beside.open("w", encoding="utf8", newline="") as file:
            _write_lines(file, self._columns, [dict(zip(self._columns, self._columns, strict=True)), *self._lines])
        beside.replace(self.path)


def _write_lines(file: Any, columns: Sequence[str], lines: Iterable[Mapping[str, str]]) -> None:
    csv.DictWriter(file, columns, restval="", lineterminator="\n").writerows(lines)
    file.flush()
    os.fsync(file.fileno())


def _cell(value: Any) -> str:
    """As it stands in the file: on one line, so that the end of a file tells whether its last row is whole."""
    if value is None:
        return ""
    return " ".join(f"{value:.6g}".split() if isinstance(value, float) else str(value).split())


def _whole_groups(lines: Iterable[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Rows that were written together, without what a kill cut short; a row of an older file is alone."""
    whole: list[list[dict[str, str]]] = []
    group: list[dict[str, str]] = []
    for line in lines:
        place, _, of = (line.get("part") or "1/1").partition("/")
        if int(place) != len(group) + 1:
            group = []
        group.append(line)
        if place == of:
            whole.append(group)
            group = []
    return whole


def parsed(line: Mapping[str, str]) -> Row:
    """A line of a file as it was: numbers and truth values, empty cells left out."""
    return {name: _parse(cell) for name, cell in line.items() if cell}


def _parse(cell: str) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    if re.fullmatch(r"-?(0|[1-9]\d*)", cell):
        return int(cell)
    # An exponent as it is written here has a sign: 12e3456789 is a commit.
    return float(cell) if re.fullmatch(r"-?\d+(\.\d+(e[+-]\d+)?|e[+-]\d+)|-?inf|nan", cell) else cell


# --- a run ------------------------------------------------------------------------------------------------------------


def run_cases(
    cases: Iterable[tuple[Row, Callable[[], Sequence[Row]]]], rows: Rows, device: torch.device, minutes: float | None
) -> int:
    """Measure case after case, each on disk before the next; what is there already is not measured again.

    A case that raises becomes a row that says so, and the rest goes on, but for a GPU that is lost to the process.

    Args:
        cases: the columns that name a case, and what measures it.
        minutes: since the start of the process, after which no case is begun.

    Returns: the exit status. 0: every case that fits the machine has rows, and none is wrong; 1: some are wrong, or
        there are none; 3: time was up, and the same command goes on.
    """
    keys, left, lost = [], 0, False
    gc.collect()
    gc.freeze()  # the libraries' objects stay: each case and each measurement of memory would walk them anew
    for key, measure in cases:
        keys.append(key)
        if rows.has(**key):
            continue
        if lost or (minutes is not None and time.perf_counter() - START > 60 * minutes):
            left += 1
            continue
        try:
            rows.add(*_named(measure(), key))
        except Skipped as reason:
            progress(f"skipped: {' '.join(map(str, key.values()))}: {reason}")
        except Exception as error:
            traceback.print_exc()
            rows.add({**key, "green": False, "failed": f"{type(error).__name__}: {error}"[:200]})
            lost = is_lost(device)
        gc.collect()
    if left:
        why = "the GPU answers this process no more" if lost else "time is up"
        progress(f"{why}: {left} of {len(keys)} cases are left; the same command goes on with them")
    found = [row for key in keys for row in rows.of(**key)]
    for row in found:
        if row.get("green") is False:
            name = " ".join(str(row[part]) for part in ("case", "provider") if part in row)
            print(f"WRONG: {name}: {row.get('failed', 'out of bounds')}", flush=True)
    if not found and not left:
        progress(f"nothing was measured: all {len(keys)} cases were skipped")
    if lost or any(row.get("green") is False for row in found) or not (found or left):
        return 1
    return 3 if left else 0


def _named(group: Sequence[Row], key: Row) -> list[Row]:
    """The rows with the columns of their case, by which a run that is taken up finds them."""
    if not group:
        raise RuntimeError("nothing could be measured")
    if other := [row for row in group for name, value in key.items() if row.get(name, value) != value]:
        raise ValueError(f"a row of the case {key} says otherwise of itself: {other[0]}")
    return [{**row, **key} for row in group]
