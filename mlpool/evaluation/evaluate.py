"""`mlpool eval`: scores of a model on MTEB or on local folders, resumable, with what each item contributed.

A results folder holds

    results.csv                             one row per task (see results.py), what `mlpool compare` reads
    results/MODEL/IDENTITY/TASK.json        mteb's own layout
    items/MODEL/IDENTITY/TASK.SPLIT.npz     per-item results; .json beside it marks the task as done
    predictions/MODEL/IDENTITY/             mteb's predictions where there are no per-item results (clusters, say)
    cache/IDENTITY/                         embeddings of retrieval corpora; may be deleted
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from .. import show
from ..files import write_json
from ..options import rank_and_world
from ..version import versions_line
from . import results
from .encoder import Prompts, make_encoder, name_of
from .items import count_items, items_of, keep_predictions
from .local import local_tasks
from .results import Score
from .tasks import import_mteb, mteb_tasks

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger("mlpool")
_PACKAGES = ("mlpool", "mteb", "sentence-transformers", "transformers", "torch")


def evaluate_local(
    model: SentenceTransformer,
    data: str | Path,
    tasks: Iterable[str] | None = None,
    output: str | Path | None = None,
    *,
    label: str,
    split: str = "test",
    prompts: Prompts | None = None,
    **options: Any,
) -> list[Score]:
    """Scores on folders of one's own (see local.py), offline.

    Args:
        data, tasks, split: see `local_tasks`; tasks=None is everything there that has the split.
        prompts: none by default but those stored in the model.
        output, label, options: see `evaluate`.

    Raises: see `local_tasks` and `evaluate`; ValueError naming file and line where data is broken.
    """
    import_mteb()
    with _kept_random_state():
        chosen = local_tasks(data, tasks, split)
    return _run(model, chosen, output, label=label, prompts=prompts or Prompts("model"), **options)


def evaluate(
    model: SentenceTransformer,
    tasks: str | Iterable[str],
    output: str | Path | None = None,
    *,
    label: str,
    prompts: Prompts | None = None,
    **options: Any,
) -> list[Score]:
    """Scores on MTEB's tasks.

    Args:
        model: any SentenceTransformer.
        tasks: "paper", a type ("STS": the paper's tasks of it), or names that mteb knows.
        output: the results folder. What it holds for this very model is not evaluated again. None: nothing is kept.
        label: the model's name in tables.
        prompts: mteb's instructions, bare, by default.
        options: seed (of the training, for the table), token_budget (largest number of tokens to a forward) or
            batch_size, cache (keep embeddings of corpora, default yes), shard (take this process's share of the tasks,
            by RANK and WORLD_SIZE; rank 0 returns all of them), progress (bars on stderr).

    Returns: a `Score` per task, scores from 0 to 1 (correlations from -1).

    Raises:
        ValueError: unknown tasks (the nearest are given), prompts that do not cover them.
        FileNotFoundError: data sets that are not on this machine and cannot be downloaded, after all others are done.
        ModuleNotFoundError: mteb is missing.
    """
    with _kept_random_state():
        chosen = mteb_tasks(tasks)
    return _run(model, chosen, output, label=label, prompts=prompts or Prompts("mteb"), **options)


def _run(
    model: SentenceTransformer, tasks: Sequence[AbsTask], output: str | Path | None, *, label: str, prompts: Prompts,
    seed: int | None = None, token_budget: int | None = None, batch_size: int = 32, cache: bool = True,
    shard: bool = False, progress: bool = True,
) -> list[Score]:  # fmt: skip
    if not label.strip():
        raise ValueError("label is empty; it names the model in tables")
    prompts.check(tasks)
    if shard and output is None:
        raise ValueError("sharing tasks out among processes needs an output folder, where their results meet")
    rank, world = rank_and_world()
    mine = _share(tasks, rank, world) if shard else list(tasks)
    store = None if output is None else Path(output)
    encoder = make_encoder(
        model, label, prompts, cache=store / "cache" if store and cache else None, token_budget=token_budget,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    design = str(getattr(next(iter(model.children()), None), "design", ""))
    rows: dict[str, Score] = {}
    missing: dict[str, str] = {}
    with show.progress(f"evaluating {label}", "task", shown=progress, iterable=mine) as bar:
        for task in bar:
            bar.set_postfix_str(name_of(task))
            try:
                row = replace(_evaluate(encoder, task, prompts, store), seed=seed, design=design)
            except _DataMissing as error:
                missing[name_of(task)] = str(error)
                continue
            rows[name_of(task)] = row
            if store:
                results.append(store / results.FILE_NAME, [row])
    if shard and world > 1:
        assert store is not None
        _wait_for_others()
        key = (label, encoder.mteb_model_meta.revision, seed)
        rows = {row.task: row for row in results.read(store) if (row.model, row.identity, row.seed) == key}
    if missing:
        raise FileNotFoundError(_how_to_get(missing))
    if absent := [name_of(task) for task in tasks if name_of(task) not in rows]:
        raise FileNotFoundError(f"another process could not evaluate {', '.join(absent)}; it says why")
    return [rows[name_of(task)] for task in tasks]


# --- one task ------------------------------------------------------------------------------------------------------


def _evaluate(encoder: Any, task: AbsTask, prompts: Prompts, store: Path | None) -> Score:
    """Of one task, or the result that lies there for the same model, data and prompts."""
    meta, name, split = encoder.mteb_model_meta, task.metadata.name, ",".join(task.eval_splits)
    inputs = {
        "dataset_revision": task.metadata.revision,
        "prompts": [prompts.of(task.metadata, kind, encoder.model) for kind in (None, "query", "document")],
    }
    folder = Path("items", meta.model_name_as_path(), meta.revision)
    marker = store / folder / f"{name}.{split}.json" if store else None
    if marker and (row := _read_marker(marker, inputs)):
        return replace(row, model=meta.name)
    _load(task)
    texts, seconds, started = encoder.texts, encoder.seconds, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = _mteb_evaluate(encoder, task, store, Path(scratch), afresh=marker is None or marker.exists())
        took = time.perf_counter() - started
        texts, seconds = encoder.texts - texts, encoder.seconds - seconds
        score, items = _score_of(found, task), ""
        if store and (arrays := items_of(task, Path(scratch), score)):
            items = str(folder / f"{name}.{split}.npz")
            results.write_items(store / items, **arrays)
        elif store:
            keep_predictions(Path(scratch), store / "predictions" / folder.relative_to("items"), task)
        row = Score(
            model=meta.name, task=name_of(task), task_type=task.metadata.type, score=score, identity=meta.revision,
            split=split, metric=task.metadata.main_score, n_items=count_items(task), items=items,
            seconds=round(took, 3), texts_per_second=round(texts / seconds, 1) if seconds else None,
            versions=versions_line(*_PACKAGES), date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
    task.unload_data()
    if marker:
        columns = {name: getattr(row, name) for name in results.COLUMNS}
        write_json(marker, {"inputs": inputs, "row": columns}, indent=None)
    return row


class _DataMissing(Exception):
    pass


def _load(task: AbsTask) -> None:
    """Load a task's data: mteb itself may go on without it."""
    if hasattr(task, "folder"):
        task.load_data()
        return
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _quiet():
            task.load_data()
    except (DatasetNotFoundError, HfHubHTTPError, OSError) as error:  # OSError: no connection, offline mode
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _DataMissing(f"{task.metadata.name} ({task.metadata.dataset['path']}: {reason})") from error


def _how_to_get(missing: dict[str, str]) -> str:
    """Which data sets are missing, and the command that loads just what mteb needs of them."""
    names = ", ".join(map(repr, missing))
    return (
        f"data sets that are not on this machine and could not be downloaded: {'; '.join(missing.values())}. Where "
        f'there is a network, run\n    python -c "import mteb; [mteb.get_task(t).load_data() for t in ({names},)]"\n'
        "and copy $HF_HOME (~/.cache/huggingface) to this machine; or evaluate data of your own with --local DIR. All "
        "other tasks are done and kept. HF_HUB_OFFLINE=1 saves waiting for a network that is not there"
    )


def evaluate_once(encoder: Any, task: AbsTask) -> float:
    """The main score of an encoder of `make_encoder` on a task; nothing is kept of it."""
    if not task.data_loaded:
        _load(task)
    with tempfile.TemporaryDirectory() as scratch:
        return _score_of(_mteb_evaluate(encoder, task, None, Path(scratch), afresh=True), task)


def _mteb_evaluate(encoder: Any, task: AbsTask, store: Path | None, predictions: Path, afresh: bool) -> Any:
    mteb = import_mteb()
    cache = mteb.ResultCache(store) if store else None
    if cache and not afresh:
        afresh = not _can_extend(cache, encoder.mteb_model_meta, task)
    with _kept_random_state(), _quiet(), _no_bars():
        found = mteb.evaluate(
            encoder, task, cache=cache, overwrite_strategy="always" if afresh else "only-missing",
            prediction_folder=predictions, encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            co2_tracker=False, show_progress_bar=False,
        )  # fmt: skip
    return found.task_results[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line per step, and what is known: the protocols are mteb's, superseded or converged or not."""
    log = logging.getLogger("mteb")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            known = "(?s).*(superseded|failed to converge|Number of distinct clusters)"
            warnings.filterwarnings("ignore", message=known)
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Of the datasets library, which shows one for each copy that mteb makes."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _can_extend(cache: Any, meta: Any, task: AbsTask) -> bool:
    """Whether mteb's file for this task is whole, about the same data, and lacks the split."""
    path = cache.get_task_result_path(task.metadata.name, meta)
    try:
        old = json.loads(path.read_text())
        return old["dataset_revision"] == task.metadata.revision and not set(task.eval_splits) & set(old["scores"])
    except FileNotFoundError:
        return True
    except (ValueError, KeyError):  # cut short by a kill
        return False


def _score_of(found: Any, task: AbsTask) -> float:
    """The main score, averaged over splits and subsets where there are several."""
    values = [entry["main_score"] for split in task.eval_splits for entry in found.scores[split]]
    score = float(sum(values) / len(values))
    if math.isnan(score):
        what = f"{name_of(task)}: {task.metadata.main_score}"
        logger.warning("%s is undefined (are all embeddings alike?); it counts as 0", what)
        return 0.0
    return score


# --- resuming and sharing ------------------------------------------------------------------------------------------


def _read_marker(path: Path, inputs: dict[str, Any]) -> Score | None:
    try:
        found = json.loads(path.read_text())
        row = Score(**found["row"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    there = not row.items or (path.with_suffix(".npz")).is_file()
    return row if found.get("inputs") == inputs and there else None


def _share(tasks: Sequence[AbsTask], rank: int, world: int) -> list[AbsTask]:
    """This process's tasks: the largest first, each to the process with the least so far."""
    loads = [0.0] * world
    mine = []
    for size, _, task in sorted(((_size(t), i, t) for i, t in enumerate(tasks)), key=lambda x: (-x[0], x[1])):
        least = loads.index(min(loads))
        loads[least] += size
        if least == rank:
            mine.append(task)
    return mine


def _size(task: Any) -> float:
    """Characters to encode, as far as known."""
    if hasattr(task, "size"):
        return float(task.size)
    splits = task.metadata.descriptive_stats or {}
    known = [splits[split] for split in task.eval_splits if split in splits]
    return float(sum(s.get("number_of_characters") or 200 * s.get("num_samples", 1000) for s in known) or 1e6)


def _wait_for_others() -> None:
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    dist.barrier()
    if own:
        dist.destroy_process_group()


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """mteb seeds everything, for every task; a training around it must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# --- the table ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Score]) -> str:
    """Scores by task, then the mean of each type with several tasks."""
    lines = [["task", "type", "metric", "score", "items", "seconds", "texts/s"]]
    for row in rows:
        speed = "" if row.texts_per_second is None else f"{row.texts_per_second:.0f}"
        cells = [f"{row.score:.4f}", str(row.n_items), f"{row.seconds:.1f}", speed]
        lines.append([row.task, row.task_type, row.metric, *cells])
    for kind in dict.fromkeys(row.task_type for row in rows):
        scores = [row.score for row in rows if row.task_type == kind]
        if len(scores) > 1:
            lines.append([f"mean of {len(scores)}", kind, "", f"{sum(scores) / len(scores):.4f}", "", "", ""])
    return show.aligned(lines[0], lines[1:], left=3)
