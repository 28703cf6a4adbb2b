"""Where training rows come from: files, folders, Hub names and rows in memory, all read as numbered rows."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import BadRow, plain, shorten

BATCH = 1000  # rows read and checked at a time
# What may be one row: the columns, or why there are none.
Row = dict[str, Any] | BadRow
Rows = Iterator[tuple[int, Row]]

# Words in a file's name that give its split, so that a folder's test set is not trained on.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SPACE = re.compile(r"[ \t\r\n]*")
_CSV_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is less than a long document


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
    if isinstance(source, Path) or _kind(path) or not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"there is no file {source}{_nearest(path)}")
    return [_hub(source, split, path)]


# --- files ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """A UTF-8 file's lines, without byte-order mark; bytes that are no UTF-8 become surrogates, found later."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file):
                if number == 0:
                    if raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
                    raw = raw.removeprefix(BOM_UTF8)
                yield raw.decode("utf-8", "surrogateescape")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error) or type(error).__name__


def _json_lines(path: Path) -> Rows:
    for number, line in enumerate(_lines(path), 1):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            yield number, BadRow("broken JSON", f"broken JSON: {_why(error)}")


def _json(path: Path) -> Rows:
    """One array of objects, held in memory as text and parsed row by row; otherwise JSON Lines."""
    first = next((line.lstrip() for line in _lines(path) if line.strip()), "")
    return _json_array(path) if first.startswith("[") else _json_lines(path)


def _json_array(path: Path) -> Rows:
    text, decode = "".join(_lines(path)), json.JSONDecoder().raw_decode

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too

    def broken(position: int, why: str) -> ValueError:
        # No row behind a broken one can be told apart, so this ends the file whatever on_error says.
        return ValueError(f"{path}:{text.count(chr(10), 0, position) + 1}: broken JSON: {why}")

    start = skip(0)
    line, seen = 1, 0
    position = skip(start + 1)
    while text[position : position + 1] != "]":
        line, seen = line + text.count("\n", seen, position), position
        try:
            row, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise broken(position, _why(error)) from error
        yield line, row
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise broken(position, "expected ',' or ']' after a row")
    if skip(position + 1) != len(text):
        raise broken(skip(position + 1), "text after the array's ']'")


def _csv(path: Path, delimiter: str) -> Rows:
    """Rows of a CSV file with a header, numbered by their first line. An empty field is None."""
    limit = csv.field_size_limit(_CSV_FIELD)
    try:
        reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines = f", lines {line} to {reader.line_num}" if reader.line_num > line else ""
                if header is None:
                    raise ValueError(f"{path}:{line}: broken header: {error}") from error
                yield line, BadRow("broken quotes", f"broken quotes or line end: {error}{lines}")
                continue
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}:{line}: the header names a column twice: {', '.join(map(plain, header))}")
            elif len(fields) != len(header):
                detail = f"{len(fields)} fields, but the header has {len(header)}"
                yield line, BadRow("wrong number of fields", detail)
            else:
                yield line, {name: field or None for name, field in zip(header, fields, strict=True)}
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Part:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet, is it cut short? ({error})") from error

    def read(wanted: Sequence[str] | None) -> Rows:
        number = 0
        try:
            for batch in file.iter_batches(BATCH, columns=wanted):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}[{number}]: cannot be read, is the file damaged? ({error})") from error

    return Part(str(path), read, file.schema_arrow.names, file.metadata.num_rows)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": lambda path: _csv(path, ","),
    ".tsv": lambda path: _csv(path, "\t"),
}
KINDS = f"{', '.join(READERS)} (each also with .gz) and .parquet"


def _kind(path: Path) -> str:
    """The extension that says how to read a file; "" for none of ours."""
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    return kind if kind in READERS or (kind == ".parquet" and suffixes[-1] == kind) else ""


def _file(path: Path) -> Part:
    kind = _kind(path)
    if not kind:
        raise ValueError(f"{path}: unknown extension {path.suffix!r}; read are {KINDS}")
    return _parquet(path) if kind == ".parquet" else Part(str(path), lambda wanted: READERS[kind](path))


# --- folders, the Hub, memory --------------------------------------------------------------------------------------


def _folder(path: Path, split: str) -> list[Part]:
    """A folder's files, below it too, in the order of their names; of files named after splits those of `split`."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            return open_source(saved, split)
        return [_table(saved, str(path))]
    visible = [p for p in sorted(path.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(path).parts)]
    files = [p for p in visible if p.is_file() and _kind(p)]
    if not files:
        raise FileNotFoundError(f"{path} holds no data: looked for {KINDS}; found {_some(visible) or 'nothing'}")
    # A file named after no split is data like any other only where none is named so.
    if any(words & set(_words(p)) for p in files for words in SPLITS.values()):
        mine = [p for p in files if SPLITS.get(split, {split}) & set(_words(p))]
        if not mine:
            raise FileNotFoundError(f"{path} has no file for the split {split!r}; found {_some(files)}")
        files = mine
    return [_file(p) for p in files]


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z]+", path.name.lower())


def _some(paths: Sequence[Path], most: int = 5) -> str:
    return ", ".join(p.name for p in paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _nearest(path: Path) -> str:
    """What lies beside a path that does not exist, as a hint."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 3, cutoff=0.5)
    return f"; near it: {', '.join(near)}" if near else ""


def _hub(name: str, split: str, path: Path) -> Part:
    dataset, _, config = name.partition(":")
    try:
        return _table(datasets.load_dataset(dataset, config or None, split=split), name)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a path here{_nearest(path)} nor a data set that the Hub gives ({error})"
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
