"""`mlpool encode`: files of texts to a folder of embeddings, in shards, resumable, over any number of processes.

    mlpool encode --model path corpus-*.jsonl -o embeddings
    torchrun --nproc-per-node 8 -m mlpool.cli encode --model path corpus-*.jsonl -o embeddings
    mlpool encode --model path s3://bucket/corpus-*.parquet -o s3://bucket/embeddings --ray

Shard i holds the rows from i · shard_size on, and is encoded from these rows alone, by rank i mod WORLD_SIZE or by any
actor of a Ray cluster (cluster.py): what it holds depends neither on the number of processes nor on interruptions. The
ranks meet only in the folder.
"""

import inspect
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import rank_and_world
from ..remote import to_path
from ..show import progress, some
from ..version import versions
from . import cluster
from .embedding_folder import VERSION, EmbeddingFolder
from .job import Job
from .shards import DTYPES, FORMATS, Shard
from .text_files import Reader, TextFile, check_files, find_columns, find_files

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD_SIZE = 100_000
PACKAGES = ("mlpool", "torch", "transformers", "sentence-transformers", "numpy", "pyarrow")


def encode_files(
    model: "SentenceTransformer", inputs: str | Path | Sequence[str | Path], output: str | Path, *,
    text_column: str | None = None, id_column: str | None = None,
    prompt_name: str | None = None, prompt: str | None = None,
    format: str = "npy", dtype: str = "float32", shard_size: int = SHARD_SIZE,
    normalize: bool = False, truncate_dim: int | None = None,
    token_budget: int | None = None, batch_size: int | None = None, device: str | None = None,
    allow_empty: bool = False, overwrite: bool = False, verify: bool = False, progress: bool = True,
    ray: str | None = None, actors: int | None = None, cores: int = 1,
) -> dict[str, Any] | None:  # fmt: skip
    """Encode every text of `inputs` into the folder `output`, whose files `embedding_folder` describes.

    Called again after an interruption with the same arguments, it keeps the complete shards and makes the others; the
    result is the same as without. With RANK and WORLD_SIZE in the environment (torchrun) each process takes its
    shards. SIGINT drops the shard at hand and leaves the folder whole.

    Args:
        model: any SentenceTransformer; `mlpool.load` gives ours.
        inputs: .txt (a line is a text), .jsonl, .csv, .parquet; .gz but for Parquet; several, and glob patterns. They
            and `output` are paths, URIs (s3://bucket/texts-*.parquet) or `RemotePath` of any pyarrow filesystem.
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
        ray: the address of a Ray cluster that makes the shards, "auto" or "local"; "" takes RAY_ADDRESS, else a cluster
            that runs on this machine, else starts one. The model goes there from the memory of this machine; inputs
            and output must be where every node sees them. The same shards as without, and a run may go on either way.
        actors: at most so many on the cluster, each with the model and a GPU, or on clusters without any with `cores`
            cores; by default as many as there is room for.

    Returns: the manifest; None when other processes still have shards to make.

    Raises:
        FileNotFoundError: a missing input. ValueError: faults in the inputs (`text_files`), an unknown option, a
            folder of something else or of another run (what differs), embeddings that are not finite. BlockingIOError:
            another run writes to `output` (who). ConnectionError: no Ray cluster at the address. RuntimeError: actors
            die again and again (of what).
    """
    rank, world = rank_and_world()
    _check_options(model, format, dtype, shard_size, truncate_dim, token_budget, batch_size, actors, cores)
    paths, place = find_files(inputs), to_path(output)
    if ray is not None:
        if world > 1:
            raise ValueError(f"WORLD_SIZE is {world}, and ray spreads the work itself: start one process, no torchrun")
        paths, place = [path.absolute() for path in paths], place.absolute()  # an actor works in another folder
    columns = find_columns(paths, text_column, id_column)
    folder = EmbeddingFolder(place)
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
    with nullcontext() if ray is None else cluster.connected(ray):
        if files is None:
            if overwrite:
                folder.plan()  # raises when the folder is not ours
            with _bar(progress and rank == 0, "check", None) as bar:
                elsewhere = ray is not None and len(paths) > 1
                how = {"each": cluster.each(bar.update)} if elsewhere else {"count": bar.update}
                files = check_files(paths, columns, allow_empty, **how)
            plan["inputs"] = [{**file._asdict(), "path": str(file.path)} for file in files]
        call = {"prompt": plan["prompt"], "truncate_dim": truncate_dim, "normalize_embeddings": normalize,
                "device": own_device(device, world), "convert_to_numpy": True, "show_progress_bar": False,
                "token_budget": token_budget, "batch_size": batch_size}  # fmt: skip
        call = {name: value for name, value in call.items() if value is not None}
        job = Job(folder, files, columns, call, format, dtype, truncate_dim, shard_size)
        with folder.held(rank):
            if overwrite:
                folder.clear()
            if new:
                folder.start(plan)
            done = folder.shards(verify)
            todo = [i for i in range(rank, job.shards, world) if i not in done]
            size = sum(stop - start for start, stop in map(job.range, todo))
            with _bar(progress and rank == 0, "encode" if world == 1 else f"encode, 1 of {world}", size) as bar:
                if ray is not None:
                    cluster.make(job, model, todo, bar, actors, cores)
                else:
                    for _ in job.make(model, todo, bar, Reader(files, columns)):
                        pass
            manifest = folder.finish(job.shards, lambda shards: {**plan, **_summary(shards)})
        if ray is not None and manifest is None:
            raise FileNotFoundError(
                f"shards that the cluster made are not in {folder.path}; do all nodes see the same folder there? Give "
                "a URI, or a folder that they share"
            )
        return manifest


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
    model: "SentenceTransformer", format: str, dtype: str, shard_size: int, truncate_dim: int | None,
    token_budget: int | None, batch_size: int | None, actors: int | None, cores: int,
) -> None:  # fmt: skip
    from ..pooling.base import check_choice, check_positive  # imports torch, for which a command's help does not wait

    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    sizes = {
        "truncate_dim": truncate_dim, "token_budget": token_budget, "batch_size": batch_size, "actors": actors,
    }  # fmt: skip
    check_positive(
        shard_size=shard_size, cores=cores, **{name: size for name, size in sizes.items() if size is not None}
    )
    if token_budget is not None and "token_budget" not in inspect.signature(model.encode).parameters:
        raise ValueError(f"{type(model).__name__}.encode takes no token_budget; give batch_size (--batch-size)")


def _resolve_prompt(model: "SentenceTransformer", name: str | None, prompt: str | None) -> str | None:
    prompts = getattr(model, "prompts", {})
    if name is not None and prompt is not None:
        raise ValueError(f"prompt and prompt_name are both given ({prompt!r}, {name!r}); give one")
    if name is not None and name not in prompts:
        raise ValueError(f"the model has no prompt {name!r}; it has {', '.join(map(repr, prompts)) or 'none'}")
    default = getattr(model, "default_prompt_name", None)
    return prompts.get(name or default) if prompt is None else prompt


def describe_model(model: "SentenceTransformer") -> dict[str, Any]:
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
