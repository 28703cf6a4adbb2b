"""Files: written whole or not at all, names from a file confined to their folder, hashes. Needs nothing but Python."""

import contextlib
import csv
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .remote import RemotePath, to_path

_LONGEST = 255  # bytes of a name, on every file system in use
_STALE = 86_400  # seconds after which an unfinished file is nobody's
_COUNT = itertools.count()  # of the files this process wrote


# --- names ------------------------------------------------------------------------------------------------------------


def confined(folder: str | Path, name: Any, source: str | Path | None = None) -> Path:
    """Where `name`, which was read from a file, lies in `folder`. Nothing is opened, made or deleted.

    A name has parts divided by single "/", and none of them leads out: not "..", no absolute path or drive, no link
    whose target is elsewhere. Links into the `blobs` of the Hub's cache, as its snapshots hold, are in their folder.

    Args:
        source: the file that has the name, for the message.

    Raises:
        ValueError: any other name.
    """
    folder = to_path(folder)
    if fault := _fault(name) or _leads_out(folder, folder / name):
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:76]}…"
        raise ValueError(
            f"{source or folder} names the file {shown}, which {fault}; expected a name inside {folder}. Nothing was "
            "touched; do not trust this folder, or copy it again from where it was made"
        )
    return folder / name


def _fault(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"is {type(name).__name__}, no string"
    try:
        parts = [os.fsencode(part.encode().decode()) for part in name.split("/")]
    except UnicodeError:
        return "is no valid Unicode"
    if "\0" in name or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "has a NUL, a backslash or a drive"
    if name.startswith("/"):
        return "is absolute"
    if not all(part not in (b"", b".", b"..") for part in parts):
        return "has an empty part, '.' or '..'"
    if max(map(len, parts)) > _LONGEST or len(name) > 2048:
        return "is too long"
    return None


def _leads_out(folder: Path, path: Path) -> str | None:
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return "is a link in a circle"
    if target.is_relative_to(root):
        return None
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return None
    return f"is a link out of it, to {target}"


def new_place(path: str | Path) -> Path:
    """A path that is new, or an empty folder; FileExistsError otherwise."""
    path = Path(path)
    check_link(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and not empty; remove it, or choose another name")
    return path


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path, aside: str | Path | None = None) -> Iterator[Path]:
    """A new path to write to; when the block ends without an error, what was written is on the disk and takes the place
    of `path` at once. Otherwise, or after a kill, `path` is what it was. The new path has the suffix of `path`.

        with replacing("scores.csv") as new, new.open("w") as file:
            ...

    Args:
        path: its folder is made if need be; of a link, the target is replaced.
        aside: a folder of the same file system for the unfinished file; by default the folder of `path`.

    Raises:
        IsADirectoryError: `path` is a folder. FileNotFoundError: it is a link to nothing.
    """
    path = to_path(path)
    if isinstance(path, RemotePath):
        with _moved(path, aside) as new:  # type: ignore[arg-type]
            yield new  # type: ignore[misc]
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    check_link(path)
    path = path.resolve()
    place = Path(aside or path.parent)
    place.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place, path)
    new = place / _unfinished(path)
    try:
        yield new
        flush(new)
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
        flush(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _moved(path: RemotePath, aside: RemotePath | None) -> Iterator[RemotePath]:
    """`replacing` in as few requests as it takes."""
    new = (aside or path.parent) / _unfinished(path)
    try:
        yield new
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _unfinished(path: Path | RemotePath) -> str:
    # Host and process: several may write the same file at once, and the last to finish wins.
    return f"{_stem(path)}{socket.gethostname()[:40]}.{os.getpid()}.{next(_COUNT)}.new{path.suffix}"


def _stem(path: Path | RemotePath) -> str:
    return f".{path.stem[:40]}."


def write_text(path: str | Path, text: str) -> None:
    """`text` in UTF-8, its line ends as they are; see `replacing`."""
    with replacing(path) as new:
        new.write_bytes(text.encode())


def write_json(path: str | Path, content: Any, indent: int | None = 2) -> None:
    """`content` as JSON in UTF-8; see `replacing`."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table in UTF-8, lines ending in \\n; see `replacing`."""
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def flush(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_link(path: Path) -> None:
    """Raises FileNotFoundError where an output is a link to something that is not there."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is not there; delete the link or make what it names"
        )


def check_room(folder: Path, need: int, what: str) -> None:
    """Raises OSError where the file system of `folder`, which need not be there yet, has not `need` bytes.

    Args:
        what: what they are for and what else may be done, for the message.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise OSError(f"{folder} needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there: {what}")


def remove_folder(path: Path) -> None:
    """Delete a folder with all that is in it, as far as it can be deleted."""
    if isinstance(path, RemotePath):
        path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_folder_name(folder: Path) -> None:
    """Raises NotADirectoryError, FileNotFoundError where a folder to write to is a file, or a link to nothing."""
    check_link(folder)
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file; expected a folder to write to")


def _sweep(place: Path, path: Path) -> None:
    """Delete what kills left of the same file long ago."""
    for old in place.glob(f"{glob.escape(_stem(path))}*.new*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(
    path: str | Path, kind: type | tuple[type, ...] = dict, advice: str = "copy it again, or delete it"
) -> Any:
    """The content of a JSON file whose outermost value is a `kind`.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8, no JSON, or another kind; it names the file and ends
        with `advice`.
    """
    path = to_path(path)
    content = parse_json(path.read_bytes(), str(path), advice)
    if not isinstance(content, kind):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{path} holds {content!r:.60}, expected a JSON {expected}; {advice}")
    return content


def parse_json(source: str | bytes, place: str, advice: str = "") -> Any:
    """JSON from an unknown hand, at `place`; ValueError where it cannot be read, see `json_fault`."""
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not valid JSON: {json_fault(error)}" + (f"; {advice}" if advice else "")
        ) from None


def json_fault(error: Exception) -> str:
    """What `json.loads` found wrong, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8"
    return str(error).partition(";")[0]  # an integer of more digits than Python reads


def not_unicode(text: str) -> int | None:
    r"""Where a text is none that a tokenizer takes: half a surrogate pair, as JSON may write it ("\ud83d"), or a byte
    that was no UTF-8."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with to_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Hashed:
    """A binary file to write to that counts its bytes and hashes them: what was written need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        self._file.write(data)
        return len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
