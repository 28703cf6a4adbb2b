"""The tidy CSV, one row per model × data set × seed: what `eval` writes and `compare`, `study` and people read.

    model             label                            score             main score, -1 to 1 (never percent)
    identity          hash of what was evaluated       n_items           how many texts, pairs or queries
    design            name of the design               items             .npz of per-item results, relative to the CSV
    seed              integer, empty if there is none  seconds           wall time of the evaluation
    task              data set, as mteb calls it       texts_per_second  of encoding
    task_type         STS, Retrieval, …                versions          "mlpool 0.1.0, mteb 2.26, …"
    split, metric     what `score` is                  date              ISO 8601

Columns may come in any order; all but `model`, `task`, `task_type` and `score` may be missing.

A per-item file is an .npz of arrays of one length: `item` (ids, strings or integers, each once) and either `value` (a
score per item whose mean is the metric: nDCG@10 of a query, 0 or 1 of a classified text) or `prediction` and `gold`
(pairs; the metric is their Spearman correlation).
"""

from __future__ import annotations

import csv
import difflib
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import confined, replacing, write_csv

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FILE_NAME = "results.csv"  # in a results folder


@dataclass(frozen=True)
class Score:
    """One row. `path` and `line` say where it was read; they are not columns."""

    model: str
    task: str
    task_type: str
    score: float
    identity: str = ""
    design: str = ""
    seed: int | None = None
    split: str = ""
    metric: str = ""
    n_items: int | None = None
    items: str = ""
    seconds: float | None = None
    texts_per_second: float | None = None
    versions: str = ""
    date: str = ""
    path: Path | None = field(default=None, compare=False, repr=False)
    line: int | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> tuple:
        """What makes a row the same measurement: written again, it replaces the old one."""
        return self.model, self.identity, self.seed, self.task, self.split, self.metric

    @property
    def place(self) -> str:
        return f"{self.path or 'the given rows'}" + ("" if self.line is None else f", line {self.line}")

    @property
    def items_path(self) -> Path | None:
        """The per-item file, or None if the row names none; ValueError where it is not in the table's folder."""
        folder = self.path.parent if self.path else Path()
        return confined(folder, self.items, self.place) if self.items else None


COLUMNS = tuple(f.name for f in fields(Score) if f.name not in ("path", "line"))
REQUIRED = ("model", "task", "task_type", "score")
_INTEGERS, _NUMBERS = ("seed", "n_items"), ("score", "seconds", "texts_per_second")


class Items(NamedTuple):
    """Per-item results. ids: [n]. values: [n], scores, or predictions where there is a gold. gold: [n], or None."""

    ids: NDArray[Any]
    values: NDArray[Any]
    gold: NDArray[Any] | None


# --- the CSV ----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> list[Score]:
    """Every row of a tidy CSV, or of the `results.csv` in a folder.

    Raises:
        FileNotFoundError: no such file. ValueError: unknown or missing columns, a row of another length, a cell that is
        no number where one belongs, a score outside [-1, 1]; file and line are named.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.csv")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(there)}: name the file itself" if there else ""
        raise FileNotFoundError(f"{path} does not exist: expected a tidy CSV, or a folder with {FILE_NAME}{hint}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path)
            return [_score(header, cells, path, reader.line_num) for cells in reader if cells]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a CSV row ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not UTF-8 text ({error.reason})") from error


def append(path: str | Path, rows: Iterable[Score]) -> None:
    """Add rows; a row with the same model, identity, seed, task, split and metric as an old one replaces it.

    Several processes may append to one file: each holds a lock (`.<name>.lock` beside it) and swaps the whole file in,
    so no reader sees, and no killed run leaves, half a row.
    """
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        kept = {row.key: row for row in (read(path) if path.is_file() else [])}
        kept |= {row.key: row for row in rows}
        write(path, kept.values())


def write(path: str | Path, rows: Iterable[Score]) -> None:
    """Write the rows as the whole file, at once: the old file stays until the new one is complete."""
    write_csv(path, COLUMNS, ([getattr(row, name) for name in COLUMNS] for row in rows))


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise ValueError(f"{path}, line 1: empty; expected the columns {', '.join(COLUMNS)}")
    problems = []
    for name in header:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, 1)
            problems.append(f"unknown column {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    problems += [f"column {name!r} twice" for name in sorted(set(header)) if header.count(name) > 1]
    problems += [f"missing column {name!r}" for name in REQUIRED if name not in header]
    if problems:
        raise ValueError(f"{path}, line 1: {'; '.join(problems)}; the columns are {', '.join(COLUMNS)}")


def _score(header: list[str], cells: list[str], path: Path, line: int) -> Score:
    if len(cells) != len(header):
        raise ValueError(f"{path}, line {line}: {len(cells)} cells, expected {len(header)} ({', '.join(header)})")
    given: dict[str, Any] = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    for name in REQUIRED:
        if not given[name]:
            raise ValueError(f"{path}, line {line}: {name} is empty")
    for names, kind, what in ((_INTEGERS, int, "an integer"), (_NUMBERS, float, "a number")):
        for name in names:
            text = given.get(name)
            try:
                given[name] = kind(text) if text else None
            except ValueError:
                raise ValueError(f"{path}, line {line}: {name} is {text!r}, expected {what}") from None
    if not abs(given["score"]) <= 1:  # NaN too
        percent = " (percent? divide by 100)" if 1 < given["score"] <= 100 else ""
        raise ValueError(f"{path}, line {line}: score is {given['score']}, expected a number from -1 to 1{percent}")
    return Score(**given, path=path, line=line)


# --- per-item results -------------------------------------------------------------------------------------------------


def write_items(path: str | Path, item: ArrayLike, **numbers: ArrayLike) -> None:
    """Write a per-item file (see the module): `value`, or `prediction` with `gold`. What cannot be read is not written.

    Raises:
        ValueError: both or neither form, lengths that differ, ids that repeat, numbers that are not finite.
    """
    import numpy as np

    path = Path(path)
    ids = np.asarray(item)
    arrays: dict[str, Any] = {"item": ids if ids.dtype.kind in "iuU" else ids.astype(str)}
    arrays |= {name: np.asarray(given, dtype=np.float64) for name, given in numbers.items()}
    _check_items(arrays, path)
    with replacing(path) as new:
        np.savez_compressed(new, **arrays)


def read_items(path: str | Path) -> Items:
    """What `write_items` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: not such a file, or damaged; what is wrong is said.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read, is it cut short? ({error})") from error
    _check_items(arrays, path)
    return Items(arrays["item"], arrays["value" if "value" in arrays else "prediction"], arrays.get("gold"))


def _check_items(arrays: dict[str, NDArray[Any]], path: str | Path) -> None:
    import numpy as np

    forms = {"item", "value"}, {"item", "prediction", "gold"}
    if set(arrays) not in forms:
        raise ValueError(f"{path} holds {sorted(arrays)}, expected item and value, or item, prediction and gold")
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["item"].ndim != 1 or not arrays["item"].size:
        raise ValueError(f"{path}: shapes {shapes}, expected one length, one dimension, at least one item")
    if len(np.unique(arrays["item"])) < len(arrays["item"]):
        raise ValueError(f"{path}: item ids repeat, expected each once")
    for name, array in arrays.items():
        if name != "item" and not (array.dtype.kind in "fiub" and math.isfinite(array.sum(dtype=np.float64))):
            raise ValueError(f"{path}: {name} holds what is no finite number")
