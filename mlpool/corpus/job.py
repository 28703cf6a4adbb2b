"""The work of encoding, apart from where it is done: the rows of a shard through the model into the folder."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .embedding_folder import EmbeddingFolder
from .rows import Range
from .shards import Shard
from .text_files import Columns, Reader, Row, TextFile

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

# What is in memory and sorted by length at once: batches at the edges of 32,768 texts lose about a percent to padding.
BLOCK_ROWS, BLOCK_CHARACTERS = 32_768, 2**25


@dataclass
class Job:
    """All that a process needs to make shards, but for the model; it may be pickled."""

    folder: EmbeddingFolder
    files: list[TextFile]
    columns: Columns
    call: dict[str, Any]  # arguments of the model's `encode`
    format: str
    dtype: str
    truncate_dim: int | None
    shard_size: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_size)

    def range(self, shard: int) -> Range:
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.rows)

    def make(self, model: "SentenceTransformer", shards: Sequence[int], bar: Any, reader: Reader) -> Iterator[int]:
        """Make these shards, ascending; the number of each as soon as it is complete."""
        encoder = _Encoder(model, self.call, self.dtype, self.truncate_dim)
        for shard in shards:
            start, stop = self.range(shard)
            encoder.begin()
            blocks = encoder.blocks(reader.rows(start, stop), start, bar)
            written = self.folder.write_shard(shard, self.format, stop - start, blocks, self.columns.id is not None)
            self.folder.record(shard, Shard(first_row=start, rows=stop - start, **written, **encoder.summary()))
            yield shard


class _Encoder:
    """Encodes blocks of rows and keeps the figures of a shard."""

    def __init__(self, model: "SentenceTransformer", call: dict[str, Any], dtype: str, truncate_dim: int | None):
        self.model, self.call, self.dtype, self.truncate_dim = model, call, dtype, truncate_dim
        self.counter: Any = next(model.children(), None)  # ours counts the texts that it cuts

    def begin(self) -> None:
        self.began, self.dimension, self.normalised = time.perf_counter(), 0, True
        if hasattr(self.counter, "reset_truncated"):
            self.counter.reset_truncated()

    def summary(self) -> dict[str, Any]:
        cut = getattr(self.counter, "truncated", None)
        return {
            "dimension": self.dimension,
            "normalised": self.normalised,
            "seconds": round(time.perf_counter() - self.began, 3),
            "truncated": getattr(cut, "count", None),
            "longest": getattr(cut, "longest", None),
        }

    def blocks(self, rows: Iterator[Row], first_row: int, bar: Any) -> Iterator[tuple["np.ndarray", list[Any]]]:
        for block in _blocks(rows):
            with _counting(self.model, bar, len(block)):
                embeddings = self._encode(block)
            yield embeddings, [first_row + i if r.id is None else r.id for i, r in enumerate(block)]
            first_row += len(block)

    def _encode(self, block: list[Row]) -> "np.ndarray":
        import numpy as np

        texts = ["" if row.text.isspace() else row.text for row in block]
        embeddings = np.asarray(self.model.encode(texts, **self.call))
        if embeddings.ndim != 2 or len(embeddings) != len(block):
            raise ValueError(f"encode gave {list(embeddings.shape)} for {len(block)} texts, expected one row a text")
        if self.truncate_dim and embeddings.shape[1] != self.truncate_dim:
            raise ValueError(f"truncate_dim is {self.truncate_dim}, the model's embeddings have {embeddings.shape[1]}")
        with np.errstate(over="ignore"):  # beyond float16: infinity, which is an error just below
            result = embeddings.astype(self.dtype, copy=False)
        finite = np.isfinite(result).all(axis=1)
        if not finite.all():
            row = block[int(np.argmin(finite))]
            why = "too large for float16" if np.isfinite(embeddings).all() else "NaN or infinity"
            raise ValueError(
                f"{row.path}:{row.line}: its embedding is {why}, and {int((~finite).sum())} of {len(block)} in this "
                "block; try dtype float32, or load the model in float32 or bfloat16"
            )
        self.dimension = result.shape[1]
        lengths = np.linalg.norm(result.astype("float32", copy=False), axis=1)
        self.normalised &= bool(np.abs(lengths - 1).max() < 1e-2)
        return np.ascontiguousarray(result)


def _blocks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    block: list[Row] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += len(row.text)
        if len(block) == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


@contextmanager
def _counting(model: "SentenceTransformer", bar: Any, texts: int) -> Iterator[None]:
    """Move the bar with every batch of the model, and at the end to exactly `texts` further."""
    target = bar.n + texts

    def advance(module: Any, args: Any, output: Any) -> None:
        bar.update(min(len(output["sentence_embedding"]), target - bar.n))

    hook = model.register_forward_hook(advance)
    try:
        yield
    finally:
        hook.remove()
    bar.update(target - bar.n)
