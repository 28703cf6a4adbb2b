"""One shard of embeddings: its record, and its files written, read and compared with their digests."""

import functools
import io
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import confined, read_json, sha256
from ..remote import RemotePath
from ..schema import arguments, check, section
from .rows import arrow_source, import_parquet

if TYPE_CHECKING:
    import numpy as np

FORMATS, DTYPES = ("npy", "parquet"), ("float32", "float16")
SHARD_FILE = re.compile(r"shard-\d{5,}\.(npy|parquet|ids\.json)")
Blocks = Iterable[tuple["np.ndarray", list[Any]]]  # embeddings [n, D] and their ids
ADVICE = "delete the folder, or name another"
MEND = "run the same `mlpool encode` with --verify, which makes damaged shards anew"


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
    sha256: str | None = None  # of the file; None before there were digests
    ids_sha256: str | None = None


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


def read_shard(folder: Path, shard: Shard, ids: bool = True) -> "tuple[np.ndarray, list[Any] | None]":
    """The array [rows, D] and the ids, where asked for, of a shard; ValueError where they are not as they should be."""
    path = folder / shard.file
    try:
        if shard.file.endswith(".npy"):
            array = _load_npy(path)
        else:
            column = _read_column(path, "embedding")
            array = column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {MEND}") from None
    except Exception as error:  # of many kinds: a header that is no Python, a mmap beyond the end, pyarrow's own
        raise ValueError(f"{path} cannot be read, is it cut short? ({error}); {MEND}") from error
    if array.shape != (shard.rows, shard.dimension):
        raise ValueError(f"{path} is {list(array.shape)}, expected {[shard.rows, shard.dimension]}; {MEND}")
    return array, read_ids(folder, shard) if ids and (shard.ids or shard.file.endswith(".parquet")) else None


def _load_npy(path: Path) -> "np.ndarray":
    """Memory-mapped, or in memory where the file is not local."""
    import numpy as np

    if isinstance(path, RemotePath):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_column(path: Path, name: str) -> Any:
    return import_parquet().read_table(**arrow_source(path), columns=[name])[name]


def read_ids(folder: Path, shard: Shard) -> list[Any]:
    """The ids of a shard, one a row; ValueError where they are not."""
    path = folder / (shard.ids or shard.file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {MEND}")
    if shard.ids:
        ids = read_json(path, list, MEND)
    else:
        try:
            ids = _read_column(path, "id").to_pylist()
        except Exception as error:
            raise ValueError(f"{path} cannot be read, is it cut short? ({error}); {MEND}") from error
    if len(ids) != shard.rows or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path} has {len(ids)} ids, expected {shard.rows} strings or integers; {MEND}")
    return ids


def check_shard(folder: Path, shard: Shard, ids: bool = True, embeddings: bool = True) -> None:
    """Compare the files of a shard with what was written; nothing to compare with where there are no digests."""
    for file, digest, asked in ((shard.file, shard.sha256, embeddings), (shard.ids, shard.ids_sha256, ids)):
        if file is None or digest is None or not asked:
            continue
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {MEND}")
        if sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was written; {MEND}")


def shard_files(shard: Shard) -> list[str]:
    return [shard.file, *([shard.ids] if shard.ids else [])]


def index_of(file: str) -> int:
    return int(file.removeprefix("shard-").partition(".")[0])


def read_record(entry: Any, folder: Path, source: Path) -> Shard:
    """A shard's record, checked; ValueError names what is missing, unknown or of a wrong type."""
    try:
        values = check(_shard_keys(), entry, str(source))
    except ValueError as error:
        raise ValueError(f"{error}; it was edited, or written by a newer mlpool") from None
    if missing := [f.name for f in fields(Shard) if f.default is MISSING and f.name not in values]:
        raise ValueError(f"{source} lacks {', '.join(missing)} of a shard; it was edited, or cut short: {ADVICE}")
    shard = Shard(**values)
    for file in shard_files(shard):
        confined(folder, file, source)
        if not SHARD_FILE.fullmatch(file):
            raise ValueError(f"{source} names {file!r}, expected a shard such as shard-00000.npy; {ADVICE}")
    return shard


@functools.cache
def _shard_keys() -> Any:
    return section("key", arguments(Shard))
