"""`mlpool encode`: files of texts to a folder of embeddings, in shards, resumable, over any number of processes.

    mlpool encode --model path corpus-*.jsonl -o embeddings
    torchrun --nproc-per-node 8 -m mlpool.cli encode --model path corpus-*.jsonl -o embeddings

Shard i holds the rows from i · shard_size on, and is encoded by rank i mod WORLD_SIZE from these rows alone: what it
holds depends neither on the number of processes nor on interruptions. The ranks meet only in the folder.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import rank_and_world
from ..show import progress, some
from ..version import versions
from .embedding_folder import VERSION, EmbeddingFolder
from .shards import DTYPES, FORMATS, Shard
from .text_files import Row, TextFile, check_files, find_columns, find_files, read_ranges

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

SHARD_SIZE = 100_000
# What is in memory and sorted by length at once: batches at the edges of 32,768 texts lose about a percent to padding.
BLOCK_ROWS, BLOCK_CHARACTERS = 32_768, 2**25
PACKAGES = ("mlpool", "torch", "transformers", "sentence-transformers", "numpy", "pyarrow")


def encode_files(
    model: SentenceTransformer, inputs: str | Path | Sequence[str | Path], output: str | Path, *,
    text_column: str | None = None, id_column: str | None = None,
    prompt_name: str | None = None, prompt: str | None = None,
    format: str = "npy", dtype: str = "float32", shard_size: int = SHARD_SIZE,
    normalize: bool = False, truncate_dim: int | None = None,
    token_budget: int | None = None, batch_size: int | None = None, device: str | None = None,
    allow_empty: bool = False, overwrite: bool = False, verify: bool = False, progress: bool = True,
) -> dict[str, Any] | None:  # fmt: skip
    """Encode every text of `inputs` into the folder `output`, whose files `embedding_folder` describes.

    Called again after an interruption with the same arguments, it keeps the complete shards and makes the others; the
    result is the same as without. With RANK and WORLD_SIZE in the environment (torchrun) each process takes its
    shards. SIGINT drops the shard at hand and leaves the folder whole.

    Args:
        model: any SentenceTransformer; `mlpool.load` gives ours.
        inputs: .txt (a line is a text), .jsonl, .csv, .parquet; .gz but for Parquet; several, and glob patterns.
        text_column: of .jsonl, .csv and .parquet; by default `text`, else the only string column.
        id_column: strings or integers that are kept beside the embeddings.
        prompt_name: a prompt stored in the model; prompt: one in words. By default the model's own.
        format: "npy" or "parquet". dtype: "float32" or "float16".
        shard_size: rows a shard: at most this much work is lost in a kill, for each process.
        normalize: to length 1; ours are, unless truncate_dim cuts them.
        truncate_dim: keep the first dimensions only, for models trained so (Matryoshka).
        token_budget: tokens a batch, for models whose `encode` takes it (ours); batch_size: texts a batch, for others.
            Both change speed and memory alone and may differ in a resumed run.
        device: by default the model's; with several processes the GPU of LOCAL_RANK.
        allow_empty: encode empty texts, and white space, as empty strings instead of raising.
        overwrite: delete what an earlier run left in `output`.
        verify: compare the shards that are there with what was written, and make damaged ones anew.

    Returns: the manifest; None when other processes still have shards to make.

    Raises:
        FileNotFoundError: a missing input. ValueError: faults in the inputs (`text_files`), an unknown option, a
            folder of something else or of another run (what differs), embeddings that are not finite. BlockingIOError:
            another run writes to `output` (who).
    """
    rank, world = rank_and_world()
    _check_options(model, format, dtype, shard_size, truncate_dim, token_budget, batch_size)
    paths = find_files(inputs)
    columns = find_columns(paths, text_column, id_column)
    folder = EmbeddingFolder(Path(output))
    if overwrite and world > 1:
        raise ValueError(f"overwrite would delete under the hands of {world} processes; delete {folder.path} yourself")
    plan: dict[str, Any] = {
        "version": VERSION,
        "model": describe_model(model),
        "prompt": _resolve_prompt(model, prompt_name, prompt),
        "format": format, "dtype": dtype, "shard_size": shard_size,
        "normalize": normalize, "truncate_dim": truncate_dim,
        "text_column": columns.text or None, "id_column": columns.id, "allow_empty": allow_empty,
    }  # fmt: skip
    files = _resume(folder, plan, paths) if not overwrite else None
    new = files is None
    if files is None:
        if overwrite:
            folder.plan()  # raises when the folder is not ours
        with _bar(progress and rank == 0, "check", None) as bar:
            files = check_files(paths, columns, allow_empty, bar.update)
        plan["inputs"] = [{**file._asdict(), "path": str(file.path)} for file in files]
    call = {"prompt": plan["prompt"], "truncate_dim": truncate_dim, "normalize_embeddings": normalize,
            "device": own_device(device, world), "convert_to_numpy": True, "show_progress_bar": False,
            "token_budget": token_budget, "batch_size": batch_size}  # fmt: skip
    encoder = _Encoder(model, {name: value for name, value in call.items() if value is not None}, dtype, truncate_dim)
    total = sum(file.rows for file in files)
    starts = range(0, total, shard_size)
    with folder.held(rank):
        if overwrite:
            folder.clear()
        if new:
            folder.start(plan)
        done = folder.shards(verify)
        todo = [i for i in range(rank, len(starts), world) if i not in done]
        ranges = [(starts[i], min(starts[i] + shard_size, total)) for i in todo]
        rows = read_ranges(files, columns, ranges)
        size = sum(stop - start for start, stop in ranges)
        with _bar(progress and rank == 0, "encode" if world == 1 else f"encode, 1 of {world}", size) as bar:
            for index, (start, stop) in zip(todo, ranges, strict=True):
                encoder.begin()
                blocks = encoder.blocks(islice(rows, stop - start), start, bar)
                written = folder.write_shard(index, format, stop - start, blocks, columns.id is not None)
                folder.record(index, Shard(first_row=start, rows=stop - start, **written, **encoder.summary()))
        return folder.finish(len(starts), lambda shards: {**plan, **_summary(shards)})


# --- the plan: what must be the same when a run goes on --------------------------------------------------------------


def own_device(device: str | None, world: int) -> str | None:
    """With several processes the GPU of this one, unless a device is named by number; None: where the model is."""
    if world == 1:
        return device
    import torch

    if not torch.cuda.is_available() or device not in (None, "cuda"):
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ValueError(f"LOCAL_RANK={local}, but {torch.cuda.device_count()} GPUs: start as many processes as GPUs")
    return f"cuda:{local}"


def _check_options(
    model: SentenceTransformer, format: str, dtype: str, shard_size: int, truncate_dim: int | None,
    token_budget: int | None, batch_size: int | None,
) -> None:  # fmt: skip
    from ..pooling.base import check_choice, check_positive  # imports torch, for which a command's help does not wait

    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    sizes = {"truncate_dim": truncate_dim, "token_budget": token_budget, "batch_size": batch_size}
    check_positive(shard_size=shard_size, **{name: size for name, size in sizes.items() if size is not None})
    if token_budget is not None and "token_budget" not in inspect.signature(model.encode).parameters:
        raise ValueError(f"{type(model).__name__}.encode takes no token_budget; give batch_size (--batch-size)")


def _resolve_prompt(model: SentenceTransformer, name: str | None, prompt: str | None) -> str | None:
    prompts = getattr(model, "prompts", {})
    if name is not None and prompt is not None:
        raise ValueError(f"prompt and prompt_name are both given ({prompt!r}, {name!r}); give one")
    if name is not None and name not in prompts:
        raise ValueError(f"the model has no prompt {name!r}; it has {', '.join(map(repr, prompts)) or 'none'}")
    default = getattr(model, "default_prompt_name", None)
    return prompts.get(name or default) if prompt is None else prompt


def describe_model(model: SentenceTransformer) -> dict[str, Any]:
    from ..embedder.identity import identity

    first = next(model.children(), None)
    config = getattr(getattr(first, "model", None), "config", None)
    return {
        "path": getattr(config, "_name_or_path", None) or type(model).__name__,
        "design": getattr(first, "design", None),
        "identity": identity(model),
    }


def _resume(folder: EmbeddingFolder, plan: dict[str, Any], paths: list[Path]) -> list[TextFile] | None:
    """The checked inputs of the run that `folder` holds, or None for a new one.

    Raises:
        ValueError: it was another run; all that differs is named.
    """
    old = folder.plan()
    if old is None:
        return None
    differs = [f"{n} was {old.get(n)!r}, now {plan[n]!r}" for n in plan if n != "model" and old.get(n) != plan[n]]
    before, now = old.get("model", {}), plan["model"]
    if before.get("identity") != now["identity"]:
        differs.append(
            f"the model was {before.get('path')} (identity {before.get('identity')}), now {now['path']} "
            f"({now['identity']})"
        )
    files = [TextFile(**{**entry, "path": Path(entry["path"])}) for entry in old.get("inputs", [])]
    named, now = [file.path.name for file in files], [path.name for path in paths]
    if named != now:
        differs.append(f"the inputs were {some(named)}, now {some(now)}")
    else:
        for file, path in zip(files, paths, strict=True):
            if (file.bytes, file.modified) != (path.stat().st_size, path.stat().st_mtime_ns):
                differs.append(f"{path} has changed since (size or time)")
    if differs:
        raise ValueError(
            f"{folder.path} holds another run: {'; '.join(differs)}. "
            "Name another folder, or replace that run (--overwrite)"
        )
    plan["inputs"] = old["inputs"]
    return [file._replace(path=path) for file, path in zip(files, paths, strict=True)]


# --- encoding ------------------------------------------------------------------------------------------------------


class _Encoder:
    """Encodes blocks of rows and keeps the figures of a shard."""

    def __init__(self, model: SentenceTransformer, call: dict[str, Any], dtype: str, truncate_dim: int | None):
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

    def blocks(self, rows: Iterator[Row], first_row: int, bar: Any) -> Iterator[tuple[np.ndarray, list[Any]]]:
        for block in _blocks(rows):
            with _counting(self.model, bar, len(block)):
                embeddings = self._encode(block)
            yield embeddings, [first_row + i if r.id is None else r.id for i, r in enumerate(block)]
            first_row += len(block)

    def _encode(self, block: list[Row]) -> np.ndarray:
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
def _counting(model: SentenceTransformer, bar: Any, texts: int) -> Iterator[None]:
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


def _bar(show: bool, name: str, total: int | None) -> Any:
    return progress(name, "texts", total, show, unit_scale=True)


def _summary(shards: list[Shard]) -> dict[str, Any]:
    """What the manifest holds beyond the plan."""
    cut = [shard for shard in shards if shard.truncated is not None]
    totals = {
        "rows": sum(shard.rows for shard in shards),
        "shards": len(shards),
        "dimension": shards[0].dimension,
        "normalised": all(shard.normalised for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "truncated": sum(shard.truncated or 0 for shard in cut) if cut else None,
        "longest": max(shard.longest or 0 for shard in cut) if cut else None,
    }
    found = versions(*PACKAGES)
    return {
        "totals": totals,
        "shards": [vars(shard) for shard in shards],
        "versions": {package: found.get(package) for package in PACKAGES},
    }
