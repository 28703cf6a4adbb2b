"""The one reader of files of rows: lines of text, JSON Lines, JSON, CSV and Parquet, in bounded memory, rows numbered.

A fault of one row (broken JSON, an open quote, a field too many) comes as a `BadRow` in its place: who reads says
whether it ends there. A fault of the whole file (a damaged gzip, no Parquet) is a ValueError that names it.
"""

import csv
import gzip
import json
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from ..files import json_fault
from ..options import near
from ..remote import RemotePath
from ..show import plain
from ..version import need

KINDS = (".txt", ".jsonl", ".csv", ".ndjson", ".json", ".tsv", ".parquet")
TEXT = "text"  # the column of a .txt file
BATCH = 1000  # rows of a table that are read at a time
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_FIELD = 2**31 - 1  # characters; csv's own limit of 131,072 is less than a long document
_JSON_SPACE = " \t\r\n"  # what JSON takes for space: U+2028 alone on a line is no blank line
_SPACE = re.compile(r"[ \t\r\n]*")


class BadRow(Exception):
    """A row that is not as it should be: `kind` to count by, `detail` to show."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


Range = tuple[int, int]  # rows [first, stop), counted from 0
# Number and row. A dict of columns, but for what JSON may hold instead: who reads checks that.
Rows = Iterator[tuple[int, Any]]


def kind_of(path: Path) -> str:
    """One of `KINDS`, by the name, `.gz` set aside; "" for none of them."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    return kind if kind in KINDS and not (packed and kind == ".parquet") else ""


def read_rows(path: Path, columns: Sequence[str] | None = None, ranges: Iterable[Range] | None = None) -> Rows:
    """The rows of a file, each with its number: the line it begins on, in Parquet the row; from 1.

    A line of .txt is {"text": line}, blank ones too; blank lines of the others are no rows. Fields of CSV are strings.
    A byte that is no UTF-8 becomes half a surrogate pair (`not_unicode` finds it). A .json file is one array, which is
    held in memory as text, or JSON Lines; all else is streamed.

    Args:
        columns: of Parquet read these alone.
        ranges: ascending and disjoint; what is left out is not parsed, and of Parquet not even read. Of others a range
            is asked for when the one before it is done.

    Raises:
        ValueError: a damaged file, UTF-16, a broken header or array.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path, columns, None if ranges is None else list(ranges))
    elif kind in _DELIMITERS:
        yield from _csv(path, _DELIMITERS[kind], ranges)
    elif kind == ".json" and next((line.lstrip() for line in lines(path) if line.strip()), "").startswith("["):
        yield from _select(_json_array(path), ranges)
    else:
        numbered: Rows = enumerate(lines(path), 1)
        if kind != ".txt":
            numbered = ((number, line) for number, line in numbered if line.strip(_JSON_SPACE))
        parse: Callable[[str], Any] = _text if kind == ".txt" else _json
        yield from ((number, parse(line)) for number, line in _select(numbered, ranges))


def column_types(path: Path) -> dict[str, str]:
    """The columns with their types, "string" among them; of JSON those of the first row. {} where there is no row.

    Raises:
        ValueError: as `read_rows`; a first row that is broken, or has no columns.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        with open_parquet(path) as file:
            return {field.name: "string" if _is_string(field.type) else str(field.type) for field in file.schema_arrow}
    if kind in _DELIMITERS:
        return dict.fromkeys(next(_csv_records(path, _DELIMITERS[kind]), (1, []))[1], "string")
    number, first = next(read_rows(path), (0, {}))
    row = columns_of(first, f"{path}:{number}")
    return {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in row.items()}


def columns_of(row: Any, place: str) -> dict[str, Any]:
    """The row at `place`, which must be one; ValueError otherwise."""
    if isinstance(row, BadRow):
        raise ValueError(f"{place}: {row.detail}")
    if not isinstance(row, dict):
        raise ValueError(f'{place}: expected an object such as {{"text": …}}, got {row!r:.60}')
    return row


def beside(path: Path) -> str:
    """What lies beside a path that does not exist, as a hint."""
    if isinstance(path, RemotePath):  # a store may hold millions beside it
        return f" (nor a bucket {bucket})" if (bucket := path.missing_bucket()) else ""
    return near(path) if path.parent.is_dir() else f" (nor a folder {path.parent})"


def _select(rows: Rows, ranges: Iterable[Range] | None) -> Rows:
    if ranges is None:
        yield from rows
        return
    position = 0
    for start, stop in ranges:
        yield from islice(rows, start - position, stop - position)
        position = stop


# --- text -------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[str]:
    """Lines with their ends, without byte-order mark. Only \\n ends one: str.splitlines also cuts at form feeds."""
    number = 0
    packed = path.suffix.lower() == ".gz"
    with path.open("rb") as raw, gzip.open(raw) if packed else nullcontext(raw) as file:  # type: ignore[attr-defined]
        try:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                    raise ValueError(f"{path} is UTF-16; save it as UTF-8")
                yield (line.removeprefix(BOM_UTF8) if number == 1 else line).decode("utf-8", "surrogateescape")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file, after line {number}: {error}") from error


def _text(line: str) -> dict[str, str]:
    return {TEXT: line.removesuffix("\n").removesuffix("\r")}


def _json(line: str) -> Any:
    try:
        return json.loads(line.rstrip(_JSON_SPACE))
    except json.JSONDecodeError as error:
        return BadRow("broken JSON", f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", f"broken JSON: {json_fault(error)}")


def _json_array(path: Path) -> Rows:
    text, decode = "".join(lines(path)), json.JSONDecoder().raw_decode

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too

    def broken(position: int, why: str) -> ValueError:
        # No row behind a broken one can be told apart, so this ends the file.
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
            raise broken(position, json_fault(error)) from error
        yield line, row
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise broken(position, "expected ',' or ']' after a row")
    if skip(position + 1) != len(text):
        raise broken(skip(position + 1), "text after the array's ']'")


def _csv(path: Path, delimiter: str, ranges: Iterable[Range] | None) -> Rows:
    records = _csv_records(path, delimiter)
    _, header = next(records, (1, []))
    for line, fields in _select(records, ranges):
        if isinstance(fields, BadRow):
            yield line, fields
        elif len(fields) != len(header):
            detail = f"{len(fields)} fields, but the header has {len(header)}"
            yield line, BadRow("wrong number of fields", detail)
        else:
            yield line, dict(zip(header, fields, strict=True))


def _csv_records(path: Path, delimiter: str) -> Rows:
    """(line it starts on, fields or what is wrong) of each record, the header first."""
    limit = csv.field_size_limit(_CSV_FIELD)  # of the whole process
    header = None
    try:
        reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                extent = f", lines {line} to {reader.line_num}" if reader.line_num > line else ""
                if header is None:
                    raise ValueError(f"{path}:{line}: broken header: {error}") from error
                yield line, BadRow("broken quotes", f"broken quotes or line end: {error}{extent}")
                continue
            if fields and header is None:
                header = fields = [name.strip() for name in fields]
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}:{line}: the header names a column twice: {', '.join(map(plain, header))}")
            if fields:
                yield line, fields
    finally:
        csv.field_size_limit(limit)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> Any:
    """pyarrow's ParquetFile; ValueError where it is none."""
    parquet = import_parquet()
    try:
        return parquet.ParquetFile(**arrow_source(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file, is it cut short? ({error})") from error


def arrow_source(path: Path) -> dict[str, Any]:
    """A path as the arguments by which pyarrow opens it."""
    if isinstance(path, RemotePath):
        return {"source": path.key, "filesystem": path.filesystem}
    return {"source": path}


def import_parquet() -> Any:
    return need("pyarrow.parquet", "Parquet files need pyarrow: pip install pyarrow")


def _is_string(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _parquet(path: Path, columns: Sequence[str] | None, ranges: Sequence[Range] | None) -> Rows:
    with open_parquet(path) as file:
        stop = 0
        for group in range(file.num_row_groups):
            start, stop = stop, stop + file.metadata.row_group(group).num_rows
            wanted = [(start, stop)] if ranges is None else [r for r in ranges if r[0] < stop and r[1] > start]
            if wanted:
                yield from _row_group(file, path, group, start, columns, wanted)


def _row_group(
    file: Any, path: Path, group: int, start: int, columns: Sequence[str] | None, ranges: Sequence[Range]
) -> Rows:
    try:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
            stop = start + batch.num_rows
            for a, b in [(max(a, start), min(b, stop)) for a, b in ranges if a < stop and b > start]:
                yield from enumerate(batch.slice(a - start, b - a).to_pylist(), a + 1)
            start = stop
    except (ValueError, OSError) as error:  # pyarrow's own; OSError for a page cut short
        raise ValueError(f"{path} is damaged after row {start}: {error}") from error
