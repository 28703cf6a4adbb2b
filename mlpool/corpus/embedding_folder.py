"""A folder of embeddings in shards, which a kill at any moment leaves whole: written by `encode_files`, read here.

    out/manifest.json           only when all is there: how it was made, every shard, totals, versions
    out/shard-00000.npy         [rows, D] float32 or float16; or .parquet with the columns id and embedding
    out/shard-00000.ids.json    for .npy, when an id column was named: a list
    out/progress/               until then: run.json (how it is made), a record of each complete shard, unfinished files

A file appears under its name only when it is complete (written beside, flushed to the disk, renamed), and a shard
counts only when its record, written after it, is there and agrees with the files' sizes. Every shard has its SHA-256,
which is compared when it is read. One run at a time writes to a folder, its processes together.
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import Hashed, check_link, confined, read_json, remove_folder, replacing
from ..remote import RemotePath, to_path
from .hold import HOLDER, held, holds
from .shards import (
    ADVICE,
    MEND,
    SHARD_FILE,
    Blocks,
    Shard,
    check_shard,
    index_of,
    read_ids,
    read_record,
    read_shard,
    shard_files,
    write_npy,
    write_parquet,
)

if TYPE_CHECKING:
    import numpy as np

MANIFEST, PROGRESS, RUN = "manifest.json", "progress", "run.json"
VERSION = 1  # of the manifest
_AT_ONCE = 16  # requests
_RECORD_FILE = re.compile(r"shard-\d{5,}\.json")


# --- writing -------------------------------------------------------------------------------------------------------


class EmbeddingFolder:
    """What a run writes to. Several processes may, each its own shards; they need no other contact."""

    def __init__(self, path: Path):
        self.path, self.progress = path, path / PROGRESS
        self.token: str | None = None  # of the hold; processes of other machines, which get a copy, write under it, too

    def plan(self) -> dict[str, Any] | None:
        """How the embeddings in this folder were made, or None for a folder that is empty or does not exist.

        Raises:
            ValueError: a folder of something else, a manifest that cannot be read.
        """
        check_link(self.path)
        if not self.path.exists():
            if isinstance(self.path, RemotePath):
                self.path.need_bucket()  # now, not after minutes of loading and checking
            return None
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; expected a folder to write to")
        names = {entry.name for entry in self.path.iterdir()}
        # In this order: whoever finishes last deletes the first when the second is there.
        for file in (self.progress / RUN, self.path / MANIFEST):
            with suppress(FileNotFoundError):
                plan = read_json(file, dict, ADVICE)
                if plan.get("version", VERSION) != VERSION:
                    raise ValueError(
                        f"{file} is of version {plan['version']!r}, and this mlpool reads {VERSION}: update mlpool, or "
                        "name another folder"
                    )
                return {name: value for name, value in plan.items() if name not in ("shards", "totals", "versions")}
        if names - {PROGRESS}:
            raise ValueError(
                f"{self.path} holds {', '.join(sorted(names)[:3])} and no {MANIFEST}: it is no folder of embeddings; "
                "name a new or empty one"
            )
        return None

    @contextmanager
    def held(self, rank: int = 0) -> Iterator[None]:
        """The folder for one run, until the block ends; see `hold.held`."""
        confined(self.path, PROGRESS)  # no link that leads elsewhere
        self.progress.mkdir(parents=True, exist_ok=True)
        mine = False
        try:
            with held(self.path, self.progress, rank) as self.token:
                mine = self.token is not None
                yield
        finally:
            self.token = None
            if mine and (self.path / MANIFEST).is_file() and not (self.progress / RUN).is_file():
                remove_folder(self.progress)  # the lock itself was left

    def start(self, plan: dict[str, Any]) -> None:
        self.progress.mkdir(parents=True, exist_ok=True)
        self._write_json(f"{PROGRESS}/{RUN}", plan)

    def clear(self) -> None:
        """Delete what an earlier run wrote, and nothing else."""
        self.plan()  # raises when the folder is not ours
        (self.path / MANIFEST).unlink(missing_ok=True)
        for entry in self.progress.glob("*.json"):  # the lock stays
            if entry.name != HOLDER:
                entry.unlink()
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if SHARD_FILE.fullmatch(entry.name):
                entry.unlink()

    def shards(self, verify: bool = False) -> dict[int, Shard]:
        """The complete ones by index; with `verify` those alone whose content is what was written."""
        # Records first: whoever finishes last deletes them when the manifest is there.
        records: list[Path] = []
        with suppress(FileNotFoundError):  # not begun, or deleted just now: then the manifest has them all
            records = [file for file in self.progress.iterdir() if _RECORD_FILE.fullmatch(file.name)]
        # A store answers slowly, and many at once; to verify is to read all, which is not done for many at once.
        with ThreadPoolExecutor(1 if verify else _AT_ONCE) as threads:
            read = zip(records, threads.map(self._record, records), strict=True)
            found = {int(file.stem.removeprefix("shard-")): shard for file, shard in read if shard}
            if (self.path / MANIFEST).is_file():
                entries = read_json(self.path / MANIFEST, dict, ADVICE).get("shards")
                for entry in entries if isinstance(entries, list) else ():
                    shard = read_record(entry, self.path, self.path / MANIFEST)
                    found.setdefault(index_of(shard.file), shard)
            whole = threads.map(self._is_whole, found, found.values(), repeat(verify))
            return {index: shard for (index, shard), good in zip(found.items(), whole, strict=True) if good}

    def _record(self, file: Path) -> Shard | None:
        """None where it is of no use, and the shard is made again, or was deleted just now."""
        with suppress(FileNotFoundError, ValueError):
            return read_record(read_json(file), self.path, file)
        return None

    def _is_whole(self, index: int, shard: Shard, verify: bool) -> bool:
        with suppress(FileNotFoundError, ValueError):
            if sum((self.path / file).stat().st_size for file in shard_files(shard)) != shard.bytes:
                return False
            if not verify:
                return True
            check_shard(self.path, shard)
            read_shard(self.path, shard)
            return index == index_of(shard.file)
        return False

    def write_shard(self, index: int, format: str, rows: int, blocks: Blocks, keep_ids: bool) -> dict[str, Any]:
        """Write the blocks to one file of `rows` rows; it counts once `record` is called. What a `Shard` says of it.

        Raises:
            BlockingIOError: the folder is another run's meanwhile.
        """
        file = f"shard-{index:05d}.{format}"
        ids_file = f"shard-{index:05d}.ids.json" if keep_ids and format == "npy" else None
        ids: list[Any] = []
        with self._replacing(file) as written:
            (write_npy if format == "npy" else write_parquet)(written, rows, blocks, ids)  # type: ignore[arg-type]
            if self.token and not holds(self.progress, self.token):
                raise BlockingIOError(f"{self.path} is no longer this run's: it has ended, or another one has taken it")
        about: dict[str, Any] = {"file": file, "ids": ids_file, "sha256": written.sha256, "bytes": written.bytes}
        if ids_file:
            with self._replacing(ids_file) as written:
                written.write(json.dumps(ids, ensure_ascii=False).encode())
            about["ids_sha256"] = written.sha256
            about["bytes"] += written.bytes
        return about

    def record(self, index: int, shard: Shard) -> None:
        self._write_json(f"{PROGRESS}/shard-{index:05d}.json", asdict(shard))

    def finish(self, count: int, manifest: Callable[[list[Shard]], dict[str, Any]]) -> dict[str, Any] | None:
        """If all `count` shards are there, write the manifest, drop the progress and return it; else None.

        Each process calls this when its own shards are done, so the last one succeeds; two at once write the same.
        """
        shards = self.shards()
        if len(shards) < count:
            return None
        content = manifest([shards[index] for index in range(count)])
        self._write_json(MANIFEST, content)
        remove_folder(self.progress)
        return content

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Hashed]:
        """A file that takes its name when it is complete, unless another process has finished the folder meanwhile and
        dropped progress/, where it is written."""
        try:
            with replacing(confined(self.path, name), self.progress) as new, new.open("wb") as stream:
                yield Hashed(stream)
        except FileNotFoundError:
            if not (self.path / MANIFEST).is_file():
                raise

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with self._replacing(name) as stream:
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


# --- reading -------------------------------------------------------------------------------------------------------


def load_embeddings(
    folder: str | Path, concatenate: bool = False, verify: bool = True
) -> "list[np.ndarray] | np.ndarray":
    """The embeddings that `encode_files` wrote, in the order of the inputs.

    Args:
        concatenate: all of them in one array, in memory; otherwise a list.
        verify: compare every file with its SHA-256, which reads all of them (about a second a GB). Without it nothing
            is read before it is used (.npy).

    Returns: a list with one array [rows, D] a shard, memory-mapped from .npy; or one array [N, D].

    Raises:
        FileNotFoundError: no folder of embeddings, or an unfinished one (how far it is); a missing shard.
        ValueError: a shard that is damaged or not of the shape that the manifest says, a damaged manifest.
    """
    import numpy as np

    folder = to_path(folder)
    shards = _complete_shards(folder, verify)
    arrays = [read_shard(folder, shard, ids=False)[0] for shard in shards]
    return np.concatenate(arrays) if concatenate else arrays


def load_ids(folder: str | Path, verify: bool = True) -> list[str] | list[int] | range:
    """The ids beside `load_embeddings(folder, concatenate=True)`; row numbers when no id column was named.

    `verify` and errors are those of `load_embeddings`; of .npy only the files with ids are looked at.
    """
    folder = to_path(folder)
    shards = _complete_shards(folder, verify, ids=True)
    ids: list[Any] = []
    for shard in shards:
        if not shard.ids and shard.file.endswith(".npy"):
            return range(sum(shard.rows for shard in shards))
        ids += read_ids(folder, shard)
    return ids


def _complete_shards(folder: Path, verify: bool, ids: bool = False) -> list[Shard]:
    """The shards of a finished folder, in order; those files compared that hold what is asked for."""
    if not (folder / MANIFEST).is_file():
        done = len(EmbeddingFolder(folder).shards())
        state = (
            f"is unfinished, {done} shards are complete: run the same command again"
            if done
            else "is no folder of embeddings"
        )
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it {state}")
    EmbeddingFolder(folder).plan()  # its version
    manifest = read_json(folder / MANIFEST, dict, ADVICE)
    entries, totals = manifest.get("shards"), manifest.get("totals")
    if not isinstance(entries, list) or not entries or not isinstance(totals, dict):
        raise ValueError(f"{folder / MANIFEST} lacks its shards or totals; it was edited, or cut short: {ADVICE}")
    shards = [read_record(entry, folder, folder / MANIFEST) for entry in entries]
    rows = 0
    for index, shard in enumerate(shards):
        if index_of(shard.file) != index or shard.first_row != rows:
            raise ValueError(f"{folder / MANIFEST} lacks shard {index}, or has it at another place; {MEND}")
        rows += shard.rows
    if (len(shards), rows) != (totals.get("shards"), totals.get("rows")):
        raise ValueError(
            f"{folder / MANIFEST} has {len(shards)} shards of {rows} rows, its totals say {totals.get('shards')} of "
            f"{totals.get('rows')}; {MEND}"
        )
    if verify:
        if any(shard.sha256 is None for shard in shards):
            from ..pooling.base import log_once  # not above: it imports torch, for which a command's help does not wait

            log_once(f"{folder} was written without digests: only the sizes of its files are checked")
        for shard in shards:
            parquet = shard.file.endswith(".parquet")
            check_shard(folder, shard, ids=ids, embeddings=parquet or not ids)
    return shards
