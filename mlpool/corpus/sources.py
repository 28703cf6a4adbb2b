"""Where rows come from: files, folders, Hub names, tables and rows in memory, all read as numbered rows."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..show import shorten, some
from .rows import BATCH, KINDS, BadRow, Rows, beside, kind_of, open_parquet, read_rows

_READ = tuple(kind for kind in KINDS if kind != ".txt")  # a line of text has no columns
_ACCEPTED = f"{', '.join(_READ[:-1])} (each also with .gz) and {_READ[-1]}"
# Words in a file's name that give its split, so that a folder's test set is not trained on.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class Part(NamedTuple):
    """One file or table.

    Attributes:
        name: what messages call it.
        read: its rows with their numbers, given the columns wanted (None: all).
        columns: their names, where known without reading.
        size: rows, where known without reading.
    """

    name: str
    read: Callable[[Sequence[str] | None], Rows]
    columns: list[str] | None = None
    size: int | None = None

    def at(self, number: int) -> str:
        """A row's place: `file:line`, from 1, in text files; `name[index]`, from 0, in tables."""
        return f"{self.name}:{number}" if self.columns is None and self.size is None else f"{self.name}[{number}]"


def open_source(source: Any, split: str) -> list[Part]:
    """The parts of one source: path, folder, Hub name (`owner/name:config`), Dataset, DatasetDict or rows.

    Raises:
        FileNotFoundError: no such path, folder without data or Hub data set; with the nearest names.
        ValueError: another kind of file, a damaged one, or no such split. TypeError: another kind of source.
    """
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise ValueError(f"there is no split {split!r}; found: {', '.join(map(str, source)) or 'none'}")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return [_table(source, "dataset")]
    if isinstance(source, list | tuple):
        return [Part("rows", lambda wanted: _rows_in_memory(source), size=len(source))]
    if not isinstance(source, str | Path):
        raise TypeError(
            "a source is a path, a Hub data set's name, a datasets.Dataset or a list of dicts, "
            f"got {type(source).__name__}"
        )
    path = Path(source).expanduser()
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name of thousands of characters
        raise ValueError(f"{shorten(str(source))} is no path: {error.strerror}") from error
    if is_folder:
        return _folder(path, split)
    if is_there:
        return [_file(path)]
    if isinstance(source, Path) or kind_of(path) or not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"there is no file {source}{beside(path)}")
    return [_hub(source, split, path)]


# --- files, folders, the Hub, memory --------------------------------------------------------------------------------


def _file(path: Path) -> Part:
    kind = kind_of(path)
    if kind not in _READ:
        raise ValueError(f"{path}: unknown extension {path.suffix!r}; read are {_ACCEPTED}")
    if kind == ".parquet":
        with open_parquet(path) as file:
            columns, size = file.schema_arrow.names, file.metadata.num_rows
        return Part(str(path), lambda wanted: ((n - 1, row) for n, row in read_rows(path, wanted)), columns, size)
    if kind in (".csv", ".tsv"):
        return Part(str(path), lambda wanted: ((number, _without_empty(row)) for number, row in read_rows(path)))
    return Part(str(path), lambda wanted: read_rows(path))


def _without_empty(row: Any) -> Any:
    """CSV has no null: an empty field is none."""
    return row if isinstance(row, BadRow) else {name: field or None for name, field in row.items()}


def _folder(path: Path, split: str) -> list[Part]:
    """A folder's files, below it too, in the order of their names; of files named after splits those of `split`."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            return open_source(saved, split)
        return [_table(saved, str(path))]
    visible = [p for p in sorted(path.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(path).parts)]
    files = [p for p in visible if p.is_file() and kind_of(p) in _READ]
    if not files:
        there = some([p.name for p in visible]) or "nothing"
        raise FileNotFoundError(f"{path} holds no data: looked for {_ACCEPTED}; found {there}")
    # A file named after no split is data like any other only where none is named so.
    if any(words & set(_words(p)) for p in files for words in SPLITS.values()):
        mine = [p for p in files if SPLITS.get(split, {split}) & set(_words(p))]
        if not mine:
            there = some([p.name for p in files])
            raise FileNotFoundError(f"{path} has no file for the split {split!r}; found {there}")
        files = mine
    return [_file(p) for p in files]


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z]+", path.name.lower())


def _hub(name: str, split: str, path: Path) -> Part:
    dataset, _, config = name.partition(":")
    try:
        return _table(datasets.load_dataset(dataset, config or None, split=split), name)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a path here{beside(path)} nor a data set that the Hub gives ({error})"
        ) from error


def _table(table: datasets.Dataset, name: str) -> Part:
    def read(wanted: Sequence[str] | None) -> Rows:
        kept = table.with_format(None)
        number = 0
        for batch in (kept.select_columns(list(wanted)) if wanted else kept).iter(BATCH):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield number, dict(zip(names, values, strict=True))
                number += 1

    return Part(name, read, table.column_names, len(table))


def _rows_in_memory(rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows):
        if isinstance(row, dict) and not all(isinstance(name, str) for name in row):
            row = BadRow("no fields", f"fields must be named by text, got {shorten(list(row))}")
        yield number, row  # what is no dict is named as such when it is checked
