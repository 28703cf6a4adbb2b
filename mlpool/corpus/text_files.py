"""One text a row of .txt, .jsonl, .csv and .parquet files, with its id; faults named by file and line."""

import glob
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..files import not_unicode
from ..remote import RemotePath, shown, to_path
from .rows import TEXT, Range, beside, column_types, columns_of, kind_of, read_rows

ACCEPTED = ".txt, .jsonl, .csv (also .ndjson, .json, .tsv; each also as .gz) and .parquet"
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


# --- which files ---------------------------------------------------------------------------------------------------


def find_files(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files, URIs and glob patterns to files, in the order given; a pattern's files are sorted by name.

    Raises:
        FileNotFoundError: no such file (the nearest names there), or a pattern that fits none.
        ValueError: a folder, a file twice, a kind of file that is not read.
    """
    paths: list[Path] = []
    for name in [inputs] if isinstance(inputs, str | Path | RemotePath) else inputs:
        path = to_path(name)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name its files, say '{path / '*.jsonl'}'")
        if not path.exists() and glob.has_magic(str(path)):
            matches = _matches(path)
            if not matches:
                hint = beside(path) if isinstance(path, RemotePath) else ""
                raise FileNotFoundError(f"no file fits the pattern {shown(name)!r}{hint}")
            paths += [match for match in matches if match.is_file()]
        elif not path.is_file():
            raise FileNotFoundError(f"{path} does not exist{beside(path)}")
        else:
            paths.append(path)
    if not paths:
        raise ValueError("no input files; name at least one")
    for i, path in enumerate(paths):
        if not kind_of(path):
            raise ValueError(f"{path}: cannot tell the kind of file by its name; accepted are {ACCEPTED}")
        if path in paths[:i]:
            raise ValueError(f"{path} is named twice; its texts would be encoded twice")
    return paths


def _matches(pattern: Path) -> list[Path]:
    if isinstance(pattern, RemotePath):
        return pattern.matches()
    return sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))


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
    path, found = next(((path, found) for path in tables if (found := column_types(path))), (tables[0], {}))
    if not found:
        raise ValueError(f"nothing to encode: no row in {', '.join(str(path) for path in tables)}")
    _check_columns(str(path), (text, id), found)
    strings = [name for name, kind in found.items() if kind == "string" and name != id]
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


# --- reading -------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What reading a file once has found."""

    file: TextFile
    empties: int
    first_empty: list[str]  # file and line of the first `NAMED_ROWS`
    id_type: type | None


def check_files(
    paths: Sequence[Path], columns: Columns, allow_empty: bool = False, count: Callable[[int], Any] | None = None,
    each: Callable[..., Iterable[Checked]] = map,
) -> list[TextFile]:  # fmt: skip
    """Read everything once: rows are counted and faults are found before hours of encoding, not after.

    Args:
        allow_empty: empty texts and texts of white space are legal.
        count: is called with the number of rows read since the last call.
        each: calls a function with every path and gives the results in their order, as `map` does; or elsewhere.

    Raises:
        ValueError: what `read_file` raises; empty texts (how many, and the first by file and line); ids of mixed types;
            no row at all.
    """
    checked: list[Checked] = []
    for found in each(partial(check_file, columns=columns, allow_empty=allow_empty, count=count), paths):
        known = next((other for other in checked if other.id_type), found)
        if found.id_type and known.id_type and found.id_type is not known.id_type:
            raise ValueError(
                f"{found.file.path}: its ids are {found.id_type.__name__}, and those of {known.file.path} are "
                f"{known.id_type.__name__}; give all as strings"
            )
        checked.append(found)
    if empties := sum(found.empties for found in checked):
        empty = [place for found in checked for place in found.first_empty][:NAMED_ROWS]
        more = ", …" if empties > len(empty) else ""
        raise ValueError(
            f"empty texts, {empties} in all: {', '.join(empty)}{more}. Take them out, or encode them as empty strings "
            "(--allow-empty)"
        )
    files = [found.file for found in checked]
    if not any(file.rows for file in files):
        raise ValueError(f"nothing to encode: no row in {', '.join(str(path) for path in paths)}")
    return files


def check_file(
    path: Path, columns: Columns, allow_empty: bool = False, count: Callable[[int], Any] | None = None
) -> Checked:
    """What `check_files` does with each."""
    stat, rows, empties, id_type = path.stat(), 0, 0, None
    empty: list[str] = []
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
    return Checked(TextFile(path, stat.st_size, stat.st_mtime_ns, rows), empties, empty, id_type)


def read_ranges(files: Sequence[TextFile], columns: Columns, ranges: Sequence[Range]) -> Iterator[Row]:
    """The rows in `ranges`, counted through all files; see `Reader`."""
    reader = Reader(files, columns)
    for start, stop in ranges:
        yield from reader.rows(start, stop)


class Reader:
    """Rows by their numbers, counted through all files. While what is asked for ascends, a file of lines is read once,
    and what lies between is passed over; a file without any of it is not opened."""

    def __init__(self, files: Sequence[TextFile], columns: Columns) -> None:
        self._files, self._columns = files, columns
        self._file: TextFile | None = None  # that is open
        self._stream: Iterator[Row] = iter(())
        self._wanted: deque[Range] = deque()  # of it, and what its stream reads next
        self._position = 0

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop); all of them are to be taken before others are asked for.

        Raises:
            ValueError: what `read_file` raises, and a file that has changed since it was checked.
        """
        first = 0
        for file in self._files:
            behind = first + file.rows
            if start < behind and stop > first:
                yield from self._read(file, max(start, first) - first, min(stop, behind) - first)
            first = behind

    def _read(self, file: TextFile, start: int, stop: int) -> Iterator[Row]:
        if file is not self._file or start < self._position or kind_of(file.path) == ".parquet":
            self._open(file)
        self._wanted.append((start, stop))
        rows = 0
        for row in islice(self._stream, stop - start):
            rows += 1
            yield row
        if rows != stop - start:
            raise ValueError(f"{file.path} changed while it was read: {file.rows} rows before, fewer now")
        self._position = stop

    def _open(self, file: TextFile) -> None:
        stat = file.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.bytes, file.modified):
            raise ValueError(f"{file.path} has changed since it was checked (size or time)")
        self._file, self._wanted = file, deque()
        self._stream = read_file(file.path, self._columns, _as_asked(self._wanted))


def _as_asked(ranges: deque[Range]) -> Iterator[Range]:
    while ranges:
        yield ranges.popleft()


def read_file(path: Path, columns: Columns, ranges: Iterable[Range] | None = None) -> Iterator[Row]:
    """The rows of one file, or those in `ranges`. Blank lines are texts in .txt, and nothing in the others.

    Raises:
        ValueError: a broken row or file, a missing column, a text that is no string: file and line.
    """
    text, kind = columns.text or TEXT, kind_of(path)
    if kind == ".txt":
        text = TEXT
    elif kind in (".csv", ".tsv", ".parquet") and (types := column_types(path)):
        _check_columns(str(path), columns, types)
        if types[text] != "string":
            raise ValueError(f"{path}: column {text!r} holds {types[text]}, expected strings")
    for line, row in read_rows(path, list(dict.fromkeys(filter(None, columns))), ranges):
        entry = columns_of(row, f"{path}:{line}")
        if text not in entry or (columns.id and columns.id not in entry):
            _check_columns(f"{path}:{line}", columns, entry)
        yield _row(entry[text], entry[columns.id] if columns.id else None, path, line)


def _row(text: Any, id: Any, path: Path, line: int) -> Row:
    if not isinstance(text, str):
        raise ValueError(f"{path}:{line}: expected a string as text, got {type(text).__name__} {text!r:.60}")
    if id is not None and (not isinstance(id, str | int) or isinstance(id, bool)):
        raise ValueError(f"{path}:{line}: expected a string or an integer as id, got {type(id).__name__} {id!r:.60}")
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        raise ValueError(f"{path}:{line}: the id {str(id)[:20]}… has more than 64 bits; give it as a string")
    for what, value in (("text", text), ("id", id)):
        if isinstance(value, str) and (at := not_unicode(value)) is not None:
            if "\udc80" <= value[at] <= "\udcff":
                raise ValueError(f"{path}:{line} is not UTF-8: byte {len(value[:at].encode())} of the {what}")
            raise ValueError(f"{path}:{line}: half a surrogate pair at character {at} of the {what}")
    return Row(text, id, path, line)
