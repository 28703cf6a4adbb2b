"""One run: train, evaluate, note its cost. And many: each in a process of its own, resumable.

A run's folder holds config.json (before it starts), log.txt, train/ (its checkpoints, while it lasts), evaluation/ (a
results folder as `mlpool eval` writes), model/ (what is kept of the model) and run.json, the last, which marks it done.
"""

import gc
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..evaluation import results
from ..evaluation.results import Score
from ..files import read_json, write_json
from ..options import rank_and_world
from ..show import progress
from .config import Run, changes

CONFIG, DONE, LOG = "config.json", "run.json", "log.txt"
_PRELOAD = [__name__, "mlpool.training.train", "mlpool.evaluation.evaluate", "mlpool.analysis.profiles", "mteb"]
_DISTRIBUTED = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_USE_", "FSDP_", "PARALLELISM_")
_PROFILED = 256  # texts over which a pool's profile is averaged
_WAIT = 2.0  # seconds between two looks at what other machines have done


# --- what is done -----------------------------------------------------------------------------------------------------


def finished(output: Path, run: Run) -> dict[str, Any] | None:
    """What a finished run noted (parameters, seconds, memory); None where it is not finished."""
    with suppress(FileNotFoundError, ValueError):
        found = read_json(output / run.folder / DONE)
        return found if found.get("hash") == run.hash else None
    return None


def check_unchanged(output: Path, runs: Sequence[Run]) -> None:
    """Raises ValueError, saying what changed, where a run was started with another config."""
    found: dict[str, list[str]] = {}
    for run in runs:
        path = output / run.folder / CONFIG
        if path.is_file():
            for change in changes(read_json(path), run.config):
                found.setdefault(change, []).append(run.label)
    if found:
        lines = [f"{change} (in {', '.join(dict.fromkeys(labels))})" for change, labels in found.items()]
        raise ValueError(
            f"{output} holds runs of another config: {'; '.join(lines)}. Results of both cannot be compared: undo the "
            "change, give another --output, or start anew in a folder beside it with --force"
        )


def collect(output: Path, runs: Sequence[Run]) -> list[Score]:
    """The rows of all finished runs; paths of per-item files are relative to `output`."""
    rows = []
    for run in runs:
        if finished(output, run):
            place = run.folder / "evaluation"
            found = [row for row in results.read(output / place) if row.split == run.split]
            rows += [
                replace(row, items=str(place / row.items) if row.items else "", path=output / results.FILE_NAME)
                for row in found
            ]
    return rows


# --- one run ----------------------------------------------------------------------------------------------------------


def execute(run: Run, output: Path, keep_model: bool) -> None:
    """Train and evaluate; what an interrupted start left is used or removed."""
    folder = output / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", blocking=False).acquire()
    except Timeout:
        raise RuntimeError(f"another process is at work on {folder}; wait for it or stop it") from None
    with lock:
        write_json(folder / CONFIG, run.config, 1)
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
        note = _train_and_evaluate(run, folder)
        if run.kind != "search":
            _keep(folder / "train", folder / "model", keep_model)
        shutil.rmtree(folder / "train", ignore_errors=True)
        write_json(folder / DONE, {"hash": run.hash, "label": run.label, "seed": run.seed, **note}, 1)


def _train_and_evaluate(run: Run, folder: Path) -> dict[str, Any]:
    from transformers import set_seed

    from ..evaluation.evaluate import evaluate_local
    from ..training.train import train

    start = _memory()
    set_seed(run.seed)  # before the pool and LoRA are drawn
    began = time.perf_counter()
    steps: dict[str, Any] = {}
    if run.kind == "untrained":
        embedder = untrained(run.train, calibrated=True)
    else:
        place = folder / "train"
        resumed = any(place.glob("checkpoint-*"))
        config = {**run.train, "seed": run.seed, "output_dir": str(place)}
        embedder = train(config, resume=True)
        steps = {**_history(place, time.perf_counter() - began), "resumed": resumed}
    device, parameters = embedder.device, count_parameters(embedder)
    training_memory = _memory()
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
        with encode_once(embedder) as work:
            evaluate_local(
                embedder, run.data_dir, run.tasks, folder / "evaluation", label=run.label, split=run.split,
                seed=run.seed, cache=False, progress=False,
            )  # fmt: skip
        evaluated, peak = time.perf_counter() - began, _memory()
        profile = _profile(embedder, work["first"]) if run.kind == "seed" else None
    return {
        **steps, "parameters": parameters, "evaluate_seconds": round(evaluated, 2),
        "texts": work["texts"], "texts_per_second": round(work["texts"] / max(work["seconds"], 1e-9), 1),
        "memory": {"start": start, "training": training_memory, "evaluation": peak}, "profile": profile,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def untrained(train: dict[str, Any], calibrated: bool = False) -> Any:
    """The embedder at step 0, as a training would begin with it; `calibrated`: its pool by the training's texts."""
    from ..training.config import read_config
    from ..training.mixture import load_mixture
    from ..training.train import begin, calibrate_start

    config = read_config({**train, "output_dir": "unused"})
    embedder = begin(config)
    if calibrated:
        calibrate_start(embedder, load_mixture(config.data))
    return embedder


def count_parameters(embedder: Any) -> dict[str, int]:
    """Of the pool and of LoRA, trainable ones, and all."""
    named = list(embedder.named_parameters())
    return {
        "pool": sum(p.numel() for n, p in named if n.startswith("pooler.")),
        "lora": sum(p.numel() for n, p in named if "lora_" in n),
        "trainable": sum(p.numel() for _, p in named if p.requires_grad),
        "total": sum(p.numel() for _, p in named),
    }


@contextmanager
def encode_once(embedder: Any) -> Iterator[dict[str, Any]]:
    """While entered, `encode` remembers what it has embedded: data sets repeat sentences.

    Yields counters of the real work: texts, seconds, and first, the first of the texts.
    """
    encode = embedder.encode
    seen: dict[Any, Any] = {}
    work: dict[str, Any] = {"texts": 0, "seconds": 0.0, "first": []}

    def once(inputs: list[str], prompt_name: str | None = None, prompt: str | None = None, **options: Any) -> Any:
        new = [text for text in dict.fromkeys(inputs) if (prompt_name, prompt, text) not in seen]
        began = time.perf_counter()
        if new:
            embeddings = encode(new, prompt_name, prompt, **options)
            seen.update(((prompt_name, prompt, text), e) for text, e in zip(new, embeddings, strict=True))
        work["texts"] += len(new)
        work["seconds"] += time.perf_counter() - began
        work["first"] += new[: _PROFILED - len(work["first"])]
        return np.stack([seen[prompt_name, prompt, text] for text in inputs])

    embedder.encode = once
    try:
        yield work
    finally:
        del embedder.encode


def _profile(embedder: Any, texts: Sequence[str]) -> dict[str, Any] | None:
    """Which layers the pool reads, where it reads several: shares over layers, and those of each head."""
    from ..analysis.profiles import pool_profile

    found = pool_profile(embedder, texts)
    if found is None:
        return None
    shares = found.by_head if found.effective is None else found.effective
    profile = {"layers": found.layers, "shares": shares.mean(0), "heads": shares, "attention": found.mean}
    listed = {name: value if isinstance(value, list) else value.round(5).tolist() for name, value in profile.items()}
    return {**listed, "texts": found.texts, "gate": found.gate}


def _history(place: Path, seconds: float) -> dict[str, Any]:
    """Seconds, steps and losses, from the trainer's own state where it wrote one."""
    path = place / "trainer_state.json"
    log = json.loads(path.read_text())["log_history"] if path.is_file() else []
    runtime = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    return {
        "train_seconds": round(runtime[-1] if runtime else seconds, 2), "train_seconds_in_all": round(seconds, 2),
        "losses": [[entry["step"], entry["loss"]] for entry in log if "loss" in entry],
    }  # fmt: skip


def _keep(train: Path, model: Path, whole: bool) -> None:
    """Move the trained model, or its pool and configs alone, out of the training folder."""
    shutil.rmtree(model, ignore_errors=True)
    if not train.is_dir():
        return
    heavy = ("checkpoint-*", "runs", "eval") + (() if whole else ("model*.safetensors*", "tokenizer*", "vocab*"))
    shutil.copytree(train, model, ignore=shutil.ignore_patterns(*heavy))


def _memory() -> dict[str, int | None]:
    """Peak of the process so far, in bytes: resident set, and CUDA where it is used."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        peak = None
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"resident": peak, "cuda": cuda}


# --- many runs --------------------------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run], output: Path, jobs: int, keep_models: bool, what: str) -> None:
    """Do what is not done yet, `jobs` at a time; under torchrun each process its share, and all wait for all.

    Raises:
        RuntimeError: some runs failed (named, with the end of what they said); the others are done.
    """
    check_unchanged(output, runs)
    missing = [run for run in runs if not finished(output, run)]
    # By place in the whole list: processes do not look at the same time, and must not both take a run.
    rank, world = rank_and_world()
    mine = [run for run in runs[rank::world] if run in missing]
    failed: dict[str, str] = {}
    with progress(what, "run", len(runs), rank == 0, initial=len(runs) - len(missing)) as bar:
        for run, code in _processes(mine, output, jobs, keep_models, bar):
            if code:
                failed[str(run.folder)] = _last_words(output / run.folder / LOG) or f"exit status {code}"
            bar.update()
            _write_results(output, runs)
        if failed:
            what = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise RuntimeError(f"{len(failed)} of {len(mine)} runs failed, all others are done. {what}")
        while waiting := [run for run in missing if not finished(output, run)]:  # done by other processes
            bar.set_postfix_str(f"waiting for {len(waiting)} of other processes")
            time.sleep(_WAIT)
    _write_results(output, runs)


def _write_results(output: Path, runs: Sequence[Run]) -> None:
    """Of the trainings; the search's results are not compared."""
    if any(run.kind == "seed" for run in runs) and (rows := collect(output, runs)):
        results.write(output / results.FILE_NAME, rows)


def _processes(
    runs: Sequence[Run], output: Path, jobs: int, keep_models: bool, bar: Any
) -> Iterator[tuple[Run, int | None]]:
    """Runs as they end, with their exit status."""
    waiting = list(runs)
    working: dict[Any, tuple[Any, Run, int]] = {}
    slots = list(range(jobs))
    processes = context()
    try:
        while waiting or working:
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                process = processes.Process(target=_child, args=(output, run, slot, jobs, keep_models))
                process.start()
                working[process.sentinel] = process, run, slot
            bar.set_postfix_str("; ".join(f"{run.label}, seed {run.seed}" for _, run, _ in working.values()))
            for sentinel in wait(list(working)):
                process, run, slot = working.pop(sentinel)
                process.join()
                slots.append(slot)
                yield run, process.exitcode
    finally:
        for process, _, _ in working.values():
            process.terminate()


def context() -> Any:
    """Processes that begin with the libraries imported, and share nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(_PRELOAD)
    return processes


def _child(
    output: Path, run: Run, slot: int, jobs: int, keep_model: bool
) -> None:  # pragma: no cover (another process)
    folder = output / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # the libraries' objects stay: collecting them anew takes a second each time
    threading.Thread(target=_end_with_parent, daemon=True).start()
    own_device(slot, jobs)
    torch.set_num_threads(threads(jobs))
    with (folder / LOG).open("w", buffering=1, encoding="utf8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            execute(run, output, keep_model)
        except BaseException as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent() -> None:
    """End when the study was killed: nobody would take the result, and the next start would find the folder locked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def own_device(slot: int, jobs: int) -> None:
    """Make this a process alone with one GPU: a run trains on one, and the study spreads runs over them."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if rank_and_world()[1] > 1:
        for name in list(os.environ):
            if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") or name.startswith(_DISTRIBUTED):
                del os.environ[name]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = range(torch.cuda.device_count()) if named is None else [d for d in named.split(",") if d]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices[(local * jobs + slot) % len(devices)])


def threads(jobs: int) -> int:
    """CPU threads of a run: OMP_NUM_THREADS, or the cores shared out among what runs at once."""
    if given := os.environ.get("OMP_NUM_THREADS"):
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (jobs * int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf8").splitlines() if log.is_file() else []
    return f"{lines[-1].strip()} (all of it in {log})" if lines else ""
