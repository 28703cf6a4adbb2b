"""What a study is about to do, and about how long it takes, from one timed step and one timed batch of each design."""

import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ..evaluation.local import local_tasks
from ..files import read_json, write_json
from ..options import rank_and_world
from ..show import aligned, progress
from ..training.columns import text_columns
from ..training.config import read_config
from ..training.losses import InfoNCE
from ..training.mixture import load_mixture
from .config import UNTRAINED, Run, Study
from .runs import context, count_parameters, finished, own_device, threads, untrained

PROBE = "probe.json"
_TEXTS = 64  # of a timed batch


def plan(study: Study, jobs: int, probe: bool = True) -> str:
    """The plan as text: runs, parameters, steps, tokens and seconds of each design, and the sum."""
    search = study.search_runs() if study.search else []
    runs = study.runs()
    timed = _probes(study, jobs) if probe else {}
    lines = [["design", "runs", "done", "trainable", "pool", "total", "steps", "s/step", "min"]]
    total, steps, tokens = 0.0, 0, 0.0
    for entry in study.entries:
        found = timed.get(entry.label, {})
        mine = [r for r in (*search, *runs) if r.label in (entry.label, UNTRAINED.format(entry.label))]
        waiting = [r for r in mine if not finished(study.output, r)]
        seconds = sum(_seconds(r, found) for r in waiting)
        total += seconds
        steps += sum(_steps(r, found) for r in waiting)
        tokens += sum(_steps(r, found) for r in waiting) * found.get("tokens", 0)
        counts = found.get("parameters", {})
        lines.append([
            entry.label, str(len(mine)), str(len(mine) - len(waiting)),
            *(f"{counts[name] / 1e6:.2f} M" if counts else "?" for name in ("trainable", "pool", "total")),
            str(_steps(mine[-1], found)), f"{found['step_seconds']:.2f}" if found else "?",
            f"{seconds / 60:.1f}" if found else "?",
        ])  # fmt: skip
    processes = jobs * rank_and_world()[1]
    summary = [
        f"base      {study.base}",
        f"data      {study.data_dir}; tasks {', '.join(study.tasks) if study.tasks else 'all that are there'} "
        f"({study.split})",
        f"seeds     {', '.join(map(str, study.seeds))}; baseline {study.baseline}",
        f"search    {_search_line(study, search)}",
        f"to do     {steps} steps, {tokens / 1e6:.2f} M tokens of training",
        f"time      about {_duration(total / processes)} with {processes} at a time, {threads(jobs)} threads each"
        if timed else "time      not estimated",
        f"output    {study.output}",
    ]  # fmt: skip
    return "\n".join([aligned(lines[0], lines[1:]), "", *summary])


def _search_line(study: Study, search: Sequence[Run]) -> str:
    if not search:
        return "none: every design trains by the recipe of the config"
    grid = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in study.search["grid"].items())
    return f"{grid}; per {study.search['per']}, {len(search)} short runs scored on the dev split"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- the estimate -----------------------------------------------------------------------------------------------------


def _steps(run: Run, found: dict[str, Any]) -> int:
    if run.kind == "untrained":
        return 0
    steps = run.train.get("max_steps") or 0
    return int(steps if steps > 0 else found.get("steps", 0))


def _seconds(run: Run, found: dict[str, Any]) -> float:
    if not found:
        return 0.0
    accumulated = run.train.get("gradient_accumulation_steps", 1)
    size = found["sizes"]["search" if run.kind == "search" else "runs"]
    return (
        found["start_seconds"]
        + _steps(run, found) * accumulated * found["step_seconds"]
        + size * found["encode_seconds_per_byte"]
    )


def _probes(study: Study, jobs: int) -> dict[str, dict[str, Any]]:
    """What `probe` finds for each entry; kept, since nothing of it changes on the same machine."""
    path = study.output / PROBE
    machine = [platform.node(), threads(jobs)]
    try:
        kept = read_json(path)
        known = kept["designs"] if kept["machine"] == machine else {}
    except (FileNotFoundError, ValueError, KeyError):
        known = {}
    todo = [run for run in study.runs() if run.kind == "seed" and run.seed == study.seeds[0]]
    if missing := [run for run in todo if known.get(run.label, {}).get("hash") != run.hash]:
        sizes = {"runs": _bytes(study.data_dir, study.tasks, study.split), "search": 0}
        if study.search:
            sizes["search"] = _bytes(study.data_dir, study.search["tasks"], study.search["split"])
        processes = context()
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=_probe_process, args=(missing, jobs, sender))
        process.start()
        sender.close()
        try:
            for run in missing:
                found = receiver.recv()
                if isinstance(found, Exception):
                    raise found
                known[run.label] = {**found, "hash": run.hash, "sizes": sizes}
        except EOFError:
            raise RuntimeError(f"a step of {run.label} could not be timed; what it said is above") from None
        finally:
            process.join()
        write_json(path, {"machine": machine, "designs": known}, 1)
    return {run.label: known[run.label] for run in todo}


def _bytes(data_dir: str, tasks: Sequence[str] | None, split: str) -> int:
    return sum(task.size for task in local_tasks(data_dir, tasks, split))  # type: ignore[attr-defined]


def _probe_process(runs: Sequence[Run], jobs: int, sender: Any) -> None:  # pragma: no cover (in a process of its own)
    disable_progress_bar()
    own_device(0, jobs)
    torch.set_num_threads(threads(jobs))
    for run in progress("timing a step of each design", "design", iterable=runs, leave=False):
        try:
            sender.send(probe(run))
        except (ValueError, OSError) as error:
            sender.send(type(error)(f"{run.label}: {error}"))
            return


def probe(run: Run) -> dict[str, Any]:
    """Seconds of one training step and of encoding, each measured at the second time, and the number of parameters.

    Returns: start_seconds (loading), step_seconds (forward and backward of one batch), tokens (of a step),
    encode_seconds_per_byte, steps (of a training by epochs), parameters.
    """
    from ..training.train import training_arguments  # the trainer, for which a plan without estimates does not wait

    config = read_config({**run.train, "output_dir": "unused"})
    mixture = load_mixture(config.data)
    steps = mixture.count_steps(training_arguments(config), 1)
    pairs = max((source.pairs for source in mixture.sources), key=len)
    began = time.perf_counter()
    embedder = untrained(run.train)
    started = time.perf_counter() - began
    size = config.arguments.get("per_device_train_batch_size", 8)
    batch = pairs.shuffle(seed=0).select(range(min(size, len(pairs))))
    columns = [list(batch[name]) for name in text_columns(batch)]
    # Without a teacher, whose part is next to nothing of a step.
    loss = InfoNCE(embedder, **{name: value for name, value in config.loss.items() if name != "teacher"})
    embedder.train()
    for _ in range(2):
        began = time.perf_counter()
        features = [embedder.preprocess(column) for column in columns]
        tokens = sum(int(part["attention_mask"].sum()) for part in features)
        moved = [{key: value.to(embedder.device) for key, value in part.items()} for part in features]
        with torch.autocast(embedder.device.type, torch.bfloat16, enabled=bool(config.arguments.get("bf16"))):
            value = loss(moved, None)
        value.backward()
        step = time.perf_counter() - began
    texts = [text for column in columns for text in column][:_TEXTS]
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(embedder.device.type, torch.bfloat16, enabled=run.bf16):
            embedder.encode(texts)
        encoding = time.perf_counter() - began
    return {
        "start_seconds": round(started, 3), "step_seconds": round(step, 4), "tokens": tokens,
        "encode_seconds_per_byte": encoding / sum(len(text.encode()) for text in texts), "steps": steps.made,
        "parameters": count_parameters(embedder),
    }  # fmt: skip
