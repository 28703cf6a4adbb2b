"""Files of any pyarrow filesystem (S3, GCS, Azure, HDFS, fsspec's), with what of pathlib's paths a corpus needs.

What reads and writes a corpus takes both kinds of path alike. Nothing is flushed or locked here: an object store shows
an object when it is complete, and a file elsewhere takes its name by a move.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

_BUFFER = 8 << 20  # bytes a request: a store answers many small ones slowly
_COPIED = 5 << 30  # bytes that S3 copies at most in one request, and a move is a copy there
_MAGIC = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^/\]]+\]|[^*?[]+|\[")
_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def _spelled(found: re.Match) -> str:
    """A part of a pattern as a regular expression."""
    part = found[0]
    if part[0] == "[" != part:
        return "[" + re.sub(r"([\\^])", r"\\\1", part[1:-1]).replace("!", "^", part[1] == "!") + "]"
    return {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part) or re.escape(part)


class Stat(NamedTuple):
    """Of `os.stat_result` what tells that a file is still the same one."""

    st_size: int
    st_mtime_ns: int  # 0 where the filesystem keeps no times


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder of a pyarrow filesystem: `RemotePath(filesystem, "bucket/texts.jsonl")`.

    Its methods are those of `pathlib.Path`; `str` shows it as a URI, without the credentials that one may hold.
    """

    filesystem: Any = field(compare=False, repr=False)
    key: str  # the path inside the filesystem

    def __str__(self) -> str:
        return f"{self.filesystem.type_name.removeprefix('py::fsspec+')}://{self.key}"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.filesystem, f"{self.key.rstrip('/')}/{name}" if self.key else name)

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.filesystem, str(PurePosixPath(self.key).parent))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.key).suffixes

    # --- what is there ------------------------------------------------------------------------------------------------

    def _info(self, of: Any = None) -> Any:
        """`get_file_info`: whatever is done to a path begins with it, so here it shows whether the store answers."""
        try:
            return self.filesystem.get_file_info(self.key if of is None else of)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(
                f"{self} cannot be looked at ({_first_line(error)}); see that credentials, region and endpoint are "
                "those of this store: in the environment, or in the URI"
            ) from error

    def missing_bucket(self) -> RemotePath | None:
        """The bucket, where this path is in one of S3 that does not exist: all in it looks as if it were only empty."""
        bucket = RemotePath(self.filesystem, self.key.partition("/")[0])
        return bucket if self.filesystem.type_name == "s3" and not bucket.exists() else None

    def exists(self) -> bool:
        return self._info().type.name != "NotFound"

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        return self._info().type.name == "Directory"

    def is_symlink(self) -> bool:
        return False

    def absolute(self) -> RemotePath:
        return self

    def resolve(self) -> RemotePath:
        return self

    def is_relative_to(self, folder: RemotePath) -> bool:
        return PurePosixPath(self.key).is_relative_to(folder.key)

    def stat(self) -> Stat:
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(f"{self} does not exist")
        return Stat(info.size or 0, info.mtime_ns or 0)

    def iterdir(self) -> Iterator[RemotePath]:
        yield from self._listed(recursive=False)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Files of this folder whose names fit."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def matches(self) -> list[RemotePath]:
        """The files that this path fits as a pattern of *, ?, [...] (in a name) and ** (across folders), sorted."""
        parts = self.key.split("/")
        first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        fits = re.compile(_MAGIC.sub(_spelled, self.key))
        root = RemotePath(self.filesystem, "/".join(parts[:first]))
        return sorted(path for path in root._listed(len(parts) > first + 1, files=True) if fits.fullmatch(path.key))

    def _listed(self, recursive: bool, files: bool = False) -> Iterator[RemotePath]:
        from pyarrow.fs import FileSelector

        for info in self._info(FileSelector(self.key, allow_not_found=True, recursive=recursive)):
            if info.is_file or not files:
                yield RemotePath(self.filesystem, info.path)

    # --- reading and writing ------------------------------------------------------------------------------------------

    def open(self, mode: str = "rb") -> Any:
        """A binary file, "rb" or "wb"."""
        if mode == "rb":
            return io.BufferedReader(self.filesystem.open_input_file(self.key), _BUFFER)
        return self.filesystem.open_output_stream(self.key)

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_file(self.key) as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        with self.filesystem.open_output_stream(self.key) as file:
            file.write(data)

    def replace(self, target: RemotePath) -> None:
        try:
            self.filesystem.move(self.key, target.key)
        except OSError:
            if self.stat().st_size <= _COPIED:
                raise
            with self.open() as old, target.open("wb") as new:
                shutil.copyfileobj(old, new, _BUFFER)
            self.unlink()

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        self.filesystem.create_dir(self.key, recursive=True)

    def need_bucket(self) -> None:
        """Make the bucket of a path in S3, where it is missing and the URI allows it; FileNotFoundError where not."""
        if bucket := self.missing_bucket():
            try:
                bucket.mkdir()
            except OSError as error:
                raise FileNotFoundError(
                    f"there is no bucket {bucket}, and it cannot be made ({_first_line(error)}); make it, or put "
                    "?allow_bucket_creation=true behind the URI"
                ) from error

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            self.filesystem.delete_file(self.key)

    def rmtree(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.key)


def to_path(name: Any) -> Path:
    """A local path, or a `RemotePath`, which stands for one wherever a corpus is read or written.

    Args:
        name: a path, or a URI: s3://bucket/key, gs://, abfs://, hdfs://, file:///path, fsspec+NAME:// and so on; with
            what else pyarrow reads from it (region, endpoint, user).

    Raises:
        ValueError: a URI of which pyarrow makes no filesystem. ModuleNotFoundError: it is not installed.
    """
    if isinstance(name, RemotePath):
        return name  # type: ignore[return-value]
    if not isinstance(name, str) or not _URI.match(name):
        return Path(name)
    if name.startswith("file://"):
        return Path(name.removeprefix("file://"))
    try:
        from pyarrow.fs import FileSystem
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{shown(name)} needs pyarrow: pip install pyarrow") from error
    try:
        filesystem, key = FileSystem.from_uri(name)
        why = "" if key else "no bucket"
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        why = _first_line(error).replace(name, shown(name)) or type(error).__name__
    if why:
        raise ValueError(
            f"{shown(name)} names no filesystem that pyarrow reaches here ({why}); expected a path, or a URI such as "
            "s3://bucket/folder"
        )
    return RemotePath(filesystem, key)  # type: ignore[return-value]


def shown(name: Any) -> str:
    """A path as it is; a URI without user, password and what stands behind the question mark."""
    name = str(name)
    # A secret may have a slash that should have been written %2F.
    return re.sub(r"(?<=://)([^/@]*|[^@]*:[^@]*)@", "", name).partition("?")[0] if _URI.match(name) else name


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
