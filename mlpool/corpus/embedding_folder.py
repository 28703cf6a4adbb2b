"""A folder of embeddings in shards, which a kill at any moment leaves whole: written by `encode_files`, read here.

    out/manifest.json           only when all is there: how it was made, every shard, totals, versions
    out/shard-00000.npy         [rows, D] float32 or float16; or .parquet with the columns id and embedding
    out/shard-00000.ids.json    for .npy, when an id column was named: a list
    out/progress/               until then: run.json (how it is made), a record of each complete shard, unfinished files

A file appears under its name only when it is complete (written beside, flushed to the disk, renamed), and a shard
counts only when its record, written after it, is there and agrees with the files' sizes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .text_files import import_parquet

if TYPE_CHECKING:
    import numpy as np

MANIFEST, PROGRESS, RUN = "manifest.json", "progress", "run.json"
FORMATS, DTYPES = ("npy", "parquet"), ("float32", "float16")
_RECORD_FILE = re.compile(r"shard-\d{5,}\.json")
_SHARD_FILE = re.compile(r"shard-\d{5,}\.(npy|parquet|ids\.json)")

Blocks = Iterable[tuple["np.ndarray", list[Any]]]  # embeddings [n, D] and their ids


@dataclass
class Shard:
    """A complete shard; row i of its file is row first_row + i of the inputs."""

    file: str
    ids: str | None
    first_row: int
    rows: int
    dimension: int
    normalised: bool
    bytes: int  # of both files
    seconds: float
    truncated: int | None  # texts longer than the model takes; None: the model does not count them
    longest: int | None  # tokens of the longest such text


# --- writing -------------------------------------------------------------------------------------------------------


class EmbeddingFolder:
    """What a run writes to. Several processes may, each its own shards; they need no other contact."""

    def __init__(self, path: Path):
        self.path, self.progress = path, path / PROGRESS

    def plan(self) -> dict[str, Any] | None:
        """How the embeddings in this folder were made, or None for a folder that is empty or does not exist.

        Raises:
            ValueError: a folder of something else, a manifest that cannot be read.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; expected a folder to write to")
        names = {entry.name for entry in self.path.iterdir()}
        # In this order: whoever finishes last deletes the first when the second is there.
        for file in (self.progress / RUN, self.path / MANIFEST):
            with suppress(FileNotFoundError):
                plan = _read_json(file)
                return {name: value for name, value in plan.items() if name not in ("shards", "totals", "versions")}
        if names - {PROGRESS}:
            raise ValueError(
                f"{self.path} holds {', '.join(sorted(names)[:3])} and no {MANIFEST}: it is no folder of embeddings; "
                "name a new or empty one"
            )
        return None

    def start(self, plan: dict[str, Any]) -> None:
        self.progress.mkdir(parents=True, exist_ok=True)
        self._write_json(self.progress / RUN, plan)

    def clear(self) -> None:
        """Delete what an earlier run wrote, and nothing else."""
        self.plan()  # raises when the folder is not ours
        (self.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.progress, ignore_errors=True)
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if _SHARD_FILE.fullmatch(entry.name):
                entry.unlink()

    def shards(self) -> dict[int, Shard]:
        """The complete ones by index."""
        # Records first: whoever finishes last deletes them when the manifest is there.
        found = {}
        try:
            for file in list(self.progress.iterdir()):
                if _RECORD_FILE.fullmatch(file.name):
                    found[int(file.stem.removeprefix("shard-"))] = Shard(**_read_json(file))
        except FileNotFoundError:
            pass  # not begun, or deleted just now: then the manifest has them all
        if (self.path / MANIFEST).is_file():
            shards = [Shard(**entry) for entry in _read_json(self.path / MANIFEST)["shards"]]
            found = {**dict(enumerate(shards)), **found}
        return {index: shard for index, shard in found.items() if self._is_whole(shard)}

    def _is_whole(self, shard: Shard) -> bool:
        try:
            files = [shard.file, *([shard.ids] if shard.ids else [])]
            return sum((self.path / file).stat().st_size for file in files) == shard.bytes
        except FileNotFoundError:
            return False

    def write_shard(
        self, index: int, format: str, rows: int, blocks: Blocks, keep_ids: bool
    ) -> tuple[str, str | None, int]:
        """Write the blocks to one file of `rows` rows; it counts once `record` is called. Names and bytes written."""
        file = f"shard-{index:05d}.{format}"
        ids_file = f"shard-{index:05d}.ids.json" if keep_ids and format == "npy" else None
        ids: list[Any] = []
        with self._replacing(self.path / file) as stream:
            (write_npy if format == "npy" else write_parquet)(stream, rows, blocks, ids)
        if ids_file:
            with self._replacing(self.path / ids_file) as stream:
                stream.write(json.dumps(ids, ensure_ascii=False).encode())
        return file, ids_file, sum((self.path / name).stat().st_size for name in (file, ids_file) if name)

    def record(self, index: int, shard: Shard) -> None:
        self._write_json(self.progress / f"shard-{index:05d}.json", asdict(shard))

    def finish(self, count: int, manifest: Callable[[list[Shard]], dict[str, Any]]) -> dict[str, Any] | None:
        """If all `count` shards are there, write the manifest, drop the progress and return it; else None.

        Each process calls this when its own shards are done, so the last one succeeds; two at once write the same.
        """
        shards = self.shards()
        if len(shards) < count:
            return None
        content = manifest([shards[index] for index in range(count)])
        try:
            self._write_json(self.path / MANIFEST, content)
        except FileNotFoundError:  # another process finished at this moment, and dropped progress/ under our hands
            if not (self.path / MANIFEST).is_file():
                raise
        shutil.rmtree(self.progress, ignore_errors=True)
        return content

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[IO[bytes]]:
        """A file that takes its name only when it is complete and on the disk."""
        # Process and host in the name: the same run started twice must not write into one file.
        self.progress.mkdir(parents=True, exist_ok=True)
        temporary = self.progress / f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too
            finally:
                os.close(folder)

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        with self._replacing(path) as stream:
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_npy(stream: IO[bytes], rows: int, blocks: Blocks, ids: list[Any]) -> None:
    """One .npy array of `rows` rows, block after block; the blocks' ids are appended to `ids`."""
    from numpy.lib import format as npy

    for i, (block, block_ids) in enumerate(blocks):
        if i == 0:
            header = {"descr": npy.dtype_to_descr(block.dtype), "fortran_order": False, "shape": (rows, block.shape[1])}
            npy.write_array_header_1_0(stream, header)
        stream.write(block.tobytes())
        ids += block_ids


def write_parquet(stream: IO[bytes], rows: int, blocks: Blocks, ids: list[Any]) -> None:
    """Columns `id` (string or int64) and `embedding` (a list of fixed size), a row group a block."""
    parquet = import_parquet()
    import pyarrow as pa

    writer = None
    try:
        for block, block_ids in blocks:
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), block.shape[1])
            table = pa.table({"id": pa.array(block_ids), "embedding": embedding})
            writer = writer or parquet.ParquetWriter(stream, table.schema, use_dictionary=False)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"expected an object, got {type(content).__name__}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read, was it edited or cut short? Delete the folder, or name another ({error})"
        ) from error
    return content


# --- reading -------------------------------------------------------------------------------------------------------


def load_embeddings(folder: str | Path, concatenate: bool = False) -> list[np.ndarray] | np.ndarray:
    """The embeddings that `encode_files` wrote, in the order of the inputs.

    Args:
        concatenate: all of them in one array, in memory; otherwise nothing is read before it is used (.npy).

    Returns: a list with one array [rows, D] a shard, memory-mapped from .npy; or one array [N, D].

    Raises:
        FileNotFoundError: no folder of embeddings, or an unfinished one (how far it is); a missing shard.
        ValueError: a shard of another shape than the manifest says.
    """
    import numpy as np

    folder = Path(folder)
    arrays = []
    for shard in _complete_shards(folder):
        if shard.file.endswith(".npy"):
            array = np.load(folder / shard.file, mmap_mode="r")
        else:
            column = import_parquet().read_table(folder / shard.file, columns=["embedding"])["embedding"]
            array = column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)
        if array.shape != (shard.rows, shard.dimension):
            raise ValueError(f"{folder / shard.file} is {list(array.shape)}, expected {[shard.rows, shard.dimension]}")
        arrays.append(array)
    return np.concatenate(arrays) if concatenate else arrays


def load_ids(folder: str | Path) -> list[str] | list[int] | range:
    """The ids beside `load_embeddings(folder, concatenate=True)`; row numbers when no id column was named."""
    folder = Path(folder)
    shards = _complete_shards(folder)
    ids: list[Any] = []
    for shard in shards:
        if shard.ids:
            ids += json.loads((folder / shard.ids).read_text(encoding="utf-8"))
        elif shard.file.endswith(".parquet"):
            ids += import_parquet().read_table(folder / shard.file, columns=["id"])["id"].to_pylist()
        else:
            return range(sum(shard.rows for shard in shards))
    return ids


def _complete_shards(folder: Path) -> list[Shard]:
    if not (folder / MANIFEST).is_file():
        done = len(EmbeddingFolder(folder).shards())
        state = (
            f"is unfinished, {done} shards are complete: run the same command again"
            if done
            else "is no folder of embeddings"
        )
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it {state}")
    return [Shard(**entry) for entry in _read_json(folder / MANIFEST)["shards"]]
