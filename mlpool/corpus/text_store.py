"""The distinct texts of one side of many pairs, numbered, with an embedding each: what mining and a teacher read.

    folder/documents.jsonl     {"text": …} a line; line i is text i
    folder/documents/          their embeddings: what `encode_files` wrote, row i of text i

Texts that are the same in NFKC, without regard to case and runs of white space, are one text, in its first form.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import read_json, replacing, sha256
from ..show import shorten
from .embedding_folder import MANIFEST, load_embeddings
from .encode import encode_files

SIDES = ("anchors", "documents")
SHARD_SIZE = 16_384  # less than of `mlpool encode`: here it is the most that is lost in a kill


def text_key(text: str) -> int:
    """64 bits, signed, of a hash of the text as it is compared: NFKC, case folded, white space as one space."""
    alike = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(alike.encode(), digest_size=8).digest(), "little", signed=True)


class TextStore:
    """One of `SIDES` in a folder. In memory are 16 bytes a text, and while it is filled 40 bytes a text given."""

    def __init__(self, folder: Path, side: str) -> None:
        self.path, self.shards = folder / f"{side}.jsonl", folder / side
        self._starts: np.ndarray | None = None
        self._file: IO[bytes] | None = None
        self._keys: np.ndarray | None = None

    # --- writing ---------------------------------------------------------------------------------------------------

    def fill(self, texts: Iterable[str], overwrite: bool = False) -> np.ndarray:
        """Write the distinct ones of `texts`, which is gone through several times.

        Args:
            overwrite: replace other texts that are there with their embeddings; default: an error.

        Returns: [N] int64, the number of each text; numbers rise in the order of first appearance.

        Raises:
            ValueError: the folder holds embeddings of other texts.
        """
        keys = np.fromiter(map(text_key, texts), np.int64)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first)
        numbers = np.empty_like(order)
        numbers[order] = np.arange(len(order))
        first = first[order]
        digest = hashlib.sha256()
        for line in _lines(texts, first):
            digest.update(line)
        if not self.path.is_file() or sha256(self.path) != digest.hexdigest():  # else it keeps its time: see `encode`
            if self.shards.exists() and not overwrite:
                raise ValueError(
                    f"{self.shards} holds embeddings of other texts than these {len(first):,} ({self.path.name}); name "
                    "another folder, or replace them (--overwrite)"
                )
            with replacing(self.path) as new, new.open("wb") as file:
                file.writelines(_lines(texts, first))
        self._starts = self._file = self._keys = None
        return numbers[inverse]

    def embed(self, model: Any, prompt: str | None, **options: Any) -> None:
        """Embed every text, at unit length; goes on where it was. Errors and options of `encode_files`."""
        options |= {"prompt": prompt, "normalize": True, "shard_size": SHARD_SIZE}
        if encode_files(model, self.path, self.shards, **options) is None:
            raise ValueError(f"other processes still write to {self.shards}; start this as one process")

    # --- reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._lines_at()) - 1

    def __getitem__(self, number: int) -> str:
        starts = self._lines_at()
        self._file = self._file or self.path.open("rb")  # kept open: texts are asked for one by one
        self._file.seek(starts[number])
        return json.loads(self._file.read(starts[number + 1] - starts[number]))["text"]  # type: ignore[no-any-return]

    def _lines_at(self) -> np.ndarray:
        """Where each line starts, and the file ends."""
        if self._starts is None:
            with self.path.open("rb") as file:
                self._starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, file), np.int64))])
        return self._starts

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            yield from (json.loads(line)["text"] for line in file)

    def find(self, texts: Iterable[str]) -> np.ndarray:
        """[N] int64: the number of each text; -1 where it is not here."""
        if self._keys is None:
            self._keys = np.fromiter(map(text_key, self), np.int64)
        keys, order = self._keys, np.argsort(self._keys)
        wanted = np.fromiter(map(text_key, texts), np.int64)
        at = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
        return np.where(keys[at] == wanted, at, -1)

    def model(self) -> dict[str, Any]:
        """Which model the embeddings are of: path, design and identity; {} before they are complete."""
        manifest = self.shards / MANIFEST
        return read_json(manifest)["model"] if manifest.is_file() else {}

    def embeddings(self) -> "Embeddings":
        """Every text's embedding.

        Raises:
            FileNotFoundError: they are not complete. ValueError: damaged, as many as other texts, or not finite (the
            text is named).
        """
        found = Embeddings(load_embeddings(self.shards))  # type: ignore[arg-type]  # a list: not concatenated
        if len(found) != len(self):
            raise ValueError(f"{self.shards} has {len(found):,} embeddings of {len(self):,} texts; delete it")
        for first, piece in found.pieces():
            finite = np.isfinite(piece).all(axis=1)
            if not finite.all():
                row = first + int(np.argmin(finite))
                raise ValueError(
                    f"{self.shards}: the embedding of row {row} is NaN or infinity, {self.path.name}:{row + 1}, "
                    f"{shorten(self[row])}; delete the folder and embed again, in float32"
                )
        return found


def _lines(texts: Iterable[str], rows: np.ndarray) -> Iterator[bytes]:
    """The texts of these rows (rising), as lines of JSON."""
    due = iter(rows.tolist())
    row = next(due, None)
    for i, text in enumerate(texts):
        if i == row:
            yield json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            row = next(due, None)


class Embeddings:
    """[N, D] in several arrays, memory-mapped: what is asked for is read."""

    ROWS = 65_536  # a piece

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])
        self.width = arrays[0].shape[1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 [*rows.shape, D]."""
        flat = rows.reshape(-1)
        result = np.empty((len(flat), self.width), np.float32)
        owner = np.searchsorted(self._starts, flat, side="right") - 1
        for i in np.unique(owner):
            result[owner == i] = self._arrays[i][flat[owner == i] - self._starts[i]]
        return result.reshape(*rows.shape, self.width)

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row of each piece, and the piece [n, D] in float32."""
        for start, array in zip(self._starts, self._arrays, strict=False):
            for first in range(0, len(array), self.ROWS):
                yield int(start) + first, np.array(array[first : first + self.ROWS], np.float32)
