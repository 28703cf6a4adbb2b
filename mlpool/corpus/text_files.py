"""Texts of .txt, .jsonl, .csv and .parquet files, row by row in bounded memory; faults named by file and line."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..files import parse_json

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
ACCEPTED = ".txt, .jsonl, .csv (each also as .gz) and .parquet"
_JSON_SPACE = " \t\r\n"  # what JSON takes for space: U+2028 alone on a line is no blank line
NAMED_ROWS = 5  # of empty texts, in an error


class Columns(NamedTuple):
    """Where text and id stand in .jsonl, .csv and .parquet; a line of .txt is a text, and `text` then empty."""

    text: str
    id: str | None


class Row(NamedTuple):
    text: str
    id: str | int | None
    path: Path
    line: int  # from 1; in Parquet the row, from 1


class TextFile(NamedTuple):
    """A checked file: what tells that it is still the same one, and how many rows it holds."""

    path: Path
    bytes: int
    modified: int  # nanoseconds since 1970
    rows: int


Range = tuple[int, int]  # rows [first, stop)


# --- which files ---------------------------------------------------------------------------------------------------


def find_files(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files and glob patterns to files, in the order given; a pattern's files are sorted by name.

    Raises:
        FileNotFoundError: no such file (the nearest names there), or a pattern that fits none.
        ValueError: a folder, a file twice, a kind of file that is not read.
    """
    paths: list[Path] = []
    for name in [inputs] if isinstance(inputs, str | Path) else inputs:
        path = Path(name)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name its files, say '{path / '*.jsonl'}'")
        if not path.exists() and glob.has_magic(str(name)):
            matches = sorted(Path(match) for match in glob.glob(str(name), recursive=True))
            if not matches:
                raise FileNotFoundError(f"no file fits the pattern {str(name)!r}")
            paths += [match for match in matches if match.is_file()]
        elif not path.is_file():
            raise FileNotFoundError(f"{path} does not exist{_nearest(path)}")
        else:
            paths.append(path)
    if not paths:
        raise ValueError("no input files; name at least one")
    for i, path in enumerate(paths):
        kind_of(path)
        if path in paths[:i]:
            raise ValueError(f"{path} is named twice; its texts would be encoded twice")
    return paths


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; neither does its folder {path.parent}"
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], cutoff=0.5)
    return f"; nearest there: {', '.join(names)}" if names else ""


def kind_of(path: Path) -> str:
    """One of `KINDS`, by the name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    if kind not in KINDS or (packed and kind == ".parquet"):
        raise ValueError(f"{path}: cannot tell the kind of file by its name; accepted are {ACCEPTED}")
    return kind


# --- which columns -------------------------------------------------------------------------------------------------


def find_columns(paths: Sequence[Path], text: str | None = None, id: str | None = None) -> Columns:
    """The columns of text and id, from the first file that has columns.

    text=None takes `text` if it is a string column, else the only string column.

    Raises:
        ValueError: a column that is not there, or several that it could be; all columns found are named.
    """
    tables = [path for path in paths if kind_of(path) != ".txt"]
    if not tables:
        if text or id:
            raise ValueError(f"{paths[0]}: a .txt file has no columns (got text={text!r}, id={id!r}): a line is a text")
        return Columns("", None)
    if id and len(tables) < len(paths):
        raise ValueError("ids are asked for, and .txt files have none; give them in .jsonl, .csv or .parquet")
    path, found = next(((path, found) for path in tables if (found := _peek(path))), (tables[0], {}))
    if not found:
        raise ValueError(f"nothing to encode: no row in {', '.join(str(path) for path in tables)}")
    _check_columns(str(path), (text, id), found)
    strings = [name for name, holds_strings in found.items() if holds_strings and name != id]
    if text is None and "text" in strings:
        text = "text"
    elif text is None:
        if len(strings) != 1:
            raise ValueError(
                f"{path}: no string column 'text', and {len(strings)} other string columns, expected one; "
                f"found: {_listed(found)}. Name it (--text-column)"
            )
        text = strings[0]
    return Columns(text, id)


def _check_columns(place: str, columns: Iterable[str | None], found: Iterable[str]) -> None:
    for name in columns:
        if name and name not in found:
            raise ValueError(f"{place} has no column {name!r}; found: {_listed(found)}")


def _listed(found: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in found) or "none"


def _peek(path: Path) -> dict[str, bool]:
    """Column names, and whether each holds strings (for .jsonl in its first row)."""
    kind = kind_of(path)
    if kind == ".parquet":
        schema = _open_parquet(path).schema_arrow
        return {field.name: _is_string(field.type) for field in schema}
    if kind == ".csv":
        return dict.fromkeys(next(_csv_records(path), (1, []))[1], True)
    line, first = next(_json_lines(path), (0, "{}"))
    return {name: isinstance(value, str) for name, value in _parse_json(path, line, first).items()}


# --- reading -------------------------------------------------------------------------------------------------------


def check_files(
    paths: Sequence[Path], columns: Columns, allow_empty: bool = False, count: Callable[[int], Any] | None = None
) -> list[TextFile]:
    """Read everything once: rows are counted and faults are found before hours of encoding, not after.

    Args:
        allow_empty: empty texts and texts of white space are legal.
        count: is called with the number of rows read since the last call.

    Raises:
        ValueError: what `read_file` raises; empty texts (how many, and the first by file and line); ids of mixed types;
            no row at all.
    """
    files: list[TextFile] = []
    empty: list[str] = []
    empties, id_type = 0, None
    for path in paths:
        stat, rows = path.stat(), 0
        for rows, row in enumerate(read_file(path, columns), 1):
            if not allow_empty and (not row.text or row.text.isspace()):
                empties += 1
                empty += [f"{row.path}:{row.line}"] if len(empty) < NAMED_ROWS else []
            id_type = id_type or type(row.id)
            if columns.id and row.id is None:
                raise ValueError(f"{row.path}:{row.line}: expected a string or an integer as id, got null")
            if type(row.id) is not id_type:
                raise ValueError(f"{row.path}:{row.line}: id {row.id!r} is no {id_type.__name__} as the first id is")
            if count and rows % 10_000 == 0:
                count(10_000)
        if count:
            count(rows % 10_000)
        files.append(TextFile(path, stat.st_size, stat.st_mtime_ns, rows))
    if empties:
        more = ", …" if empties > len(empty) else ""
        raise ValueError(
            f"empty texts, {empties} in all: {', '.join(empty)}{more}. Take them out, or encode them as empty strings "
            "(--allow-empty)"
        )
    if not any(file.rows for file in files):
        raise ValueError(f"nothing to encode: no row in {', '.join(str(path) for path in paths)}")
    return files


def read_ranges(files: Sequence[TextFile], columns: Columns, ranges: Sequence[Range]) -> Iterator[Row]:
    """The rows in `ranges` (ascending, disjoint), counted through all files; each file is read once, others not at all.

    Raises:
        ValueError: what `read_file` raises, and a file that has changed since it was checked.
    """
    start = 0
    for file in files:
        stop = start + file.rows
        local = [(max(a, start) - start, min(b, stop) - start) for a, b in ranges if a < stop and b > start]
        if local:
            stat, expected, rows = file.path.stat(), sum(b - a for a, b in local), 0
            if (stat.st_size, stat.st_mtime_ns) != (file.bytes, file.modified):
                raise ValueError(f"{file.path} has changed since it was checked (size or time)")
            for row in read_file(file.path, columns, local):
                rows += 1
                yield row
            if rows != expected:
                raise ValueError(f"{file.path} changed while it was read: {file.rows} rows before, fewer now")
        start = stop


def read_file(path: Path, columns: Columns, ranges: Sequence[Range] | None = None) -> Iterator[Row]:
    """The rows of one file, or those in `ranges`. Blank lines are texts in .txt, and nothing in .jsonl and .csv.

    Raises:
        ValueError: broken JSON, CSV, gzip, Parquet or UTF-8, a missing column, a text that is no string: file and line.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, columns, ranges)
    elif kind == ".csv":
        yield from _read_csv(path, columns, ranges)
    elif kind == ".jsonl":
        for line, source in _select(_json_lines(path), ranges):
            entry = _parse_json(path, line, source)
            _check_columns(f"{path}:{line}", columns, entry)
            yield _row(entry[columns.text], entry[columns.id] if columns.id else None, path, line)
    else:
        for line, text in _select(_lines(path), ranges):
            yield _row(text.removesuffix("\n").removesuffix("\r"), None, path, line)


def _row(text: Any, id: Any, path: Path, line: int) -> Row:
    if not isinstance(text, str):
        raise ValueError(f"{path}:{line}: expected a string as text, got {type(text).__name__} {text!r:.60}")
    if id is not None and (not isinstance(id, str | int) or isinstance(id, bool)):
        raise ValueError(f"{path}:{line}: expected a string or an integer as id, got {type(id).__name__} {id!r:.60}")
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        raise ValueError(f"{path}:{line}: the id {str(id)[:20]}… has more than 64 bits; give it as a string")
    for what, value in (("text", text), ("id", id)):
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, and no tokenizer takes it
                at = f"character {error.start} of the {what}"
                raise ValueError(f"{path}:{line}: half a surrogate pair at {at}") from None
    return Row(text, id, path, line)


def _select(items: Iterator[Any], ranges: Sequence[Range] | None) -> Iterator[Any]:
    if ranges is None:
        yield from items
        return
    position = 0
    for start, stop in ranges:
        yield from islice(items, start - position, stop - position)
        position = stop


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its end). Only \\n ends a line: str.splitlines also cuts at form feeds and U+2028."""
    opened = gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # noqa: SIM115
    number = 0
    with opened as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number} is not UTF-8: {error.reason}, byte {error.start} of the line") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file, after line {number}: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in _lines(path) if line.strip(_JSON_SPACE))


def _parse_json(path: Path, line: int, source: str) -> dict[str, Any]:
    entry = parse_json(source.strip(_JSON_SPACE), f"{path}:{line}")
    if not isinstance(entry, dict):
        raise ValueError(f'{path}:{line}: expected an object such as {{"text": …}}, got {source.strip()!r:.60}')
    return entry


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it starts on, fields) of each record, the header first."""
    # The limit is one for the whole process, and its default of 131,072 characters is short for a document.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{start} is not valid CSV: {error}") from None


def _read_csv(path: Path, columns: Columns, ranges: Sequence[Range] | None) -> Iterator[Row]:
    records = _csv_records(path)
    header = next(records, (1, []))[1]
    if header:
        _check_columns(str(path), columns, header)
    for line, fields in _select(records, ranges):
        if len(fields) != len(header):
            raise ValueError(f"{path}:{line} has {len(fields)} fields, the header {len(header)}")
        entry = dict(zip(header, fields, strict=True))
        yield _row(entry[columns.text], entry[columns.id] if columns.id else None, path, line)


def _open_parquet(path: Path) -> Any:
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def _is_string(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _read_parquet(path: Path, columns: Columns, ranges: Sequence[Range] | None) -> Iterator[Row]:
    names = [name for name in columns if name]
    with _open_parquet(path) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        _check_columns(str(path), columns, types)
        if not _is_string(types[columns.text]):
            raise ValueError(f"{path}: column {columns.text!r} holds {types[columns.text]}, expected strings")
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            wanted = [(start, stop)] if ranges is None else [r for r in ranges if r[0] < stop and r[1] > start]
            if wanted:  # row groups without a wanted row are not even read
                yield from _read_group(file, group, start, wanted, path, names)
            start = stop


def _read_group(file: Any, group: int, start: int, ranges: list[Range], path: Path, names: list[str]) -> Iterator[Row]:
    try:
        for batch in file.iter_batches(batch_size=4096, row_groups=[group], columns=names):
            stop = start + batch.num_rows
            for a, b in [(max(a, start), min(b, stop)) for a, b in ranges if a < stop and b > start]:
                part = batch.slice(a - start, b - a)
                values = [part.column(name).to_pylist() for name in names]
                ids: Iterable[Any] = values[1] if len(names) > 1 else [None] * len(values[0])
                for line, (text, id) in enumerate(zip(values[0], ids, strict=True), a + 1):
                    yield _row(text, id, path, line)
            start = stop
    except OSError as error:  # also pyarrow's own for a page cut short
        raise ValueError(f"{path} is damaged after row {start}: {error}") from error
