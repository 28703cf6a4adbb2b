"""`mlpool train`: data, model, loss and trainer from one config; resumable."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, set_seed
from transformers.utils import is_torch_xla_available

from ..corpus.rows import BadRow
from ..corpus.sources import open_source
from ..embedder import Embedder, add_lora, load
from ..embedder.folder import recover
from ..files import check_folder_name, read_json, write_text
from ..pooling.base import log_once
from ..schema import read_yaml
from .columns import text_columns, texts_of
from .config import DEFAULTS, TrainConfig, read_config
from .data import describe, load_pairs
from .losses import InfoNCE
from .steps import Steps, count_steps
from .teacher import Teacher
from .trainer import STATE, EmbedderTrainer, last_checkpoint, prepare

logger = logging.getLogger("mlpool")
CONFIG = "train_config.yaml"
# What may differ when a run is resumed: none of it changes the numbers.
_FREE = {
    "logging_steps", "logging_first_step", "report_to", "save_steps", "save_strategy", "save_total_limit", "run_name",
    "eval_steps", "eval_strategy", "disable_tqdm", "dataloader_num_workers", "log_level", "output_dir", "device",
}  # fmt: skip


def train(
    config: str | Path | Mapping[str, Any] | TrainConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
) -> Embedder:
    """Fine-tune an embedder; return it. The same under `torchrun` and `accelerate launch`.

    Args:
        config: a YAML file or its content, see `read_config`. overrides: "--key value" words.
        resume: go on from the last whole checkpoint of output_dir; from the start where there is none. A finished
            training is loaded, and nothing is changed.
        dry_run: load and check everything, up to a batch and the optimizer, print data, parameters and steps, and stop.

    Writes checkpoint-N folders, the trained embedder and the config into output_dir; nothing before the first step.

    Raises:
        ValueError: a wrong config or data (lines named); data of which no batch can be made; checkpoints in output_dir
            without `resume`; `resume` with a config that differs in what matters; a loss or gradient not finite.
    """
    config = config if isinstance(config, TrainConfig) else read_config(config, overrides)
    output = Path(config.arguments["output_dir"])
    check_folder_name(output)
    recover(output)
    first = int(os.environ.get("RANK", 0)) == 0
    checkpoint = _checkpoint(config, output, resume)
    if resume and _finished(output):
        if first:
            print(f"{output} holds a finished training: nothing to do; another output_dir starts a new one", flush=True)
        embedder = load(output)
        prepare(embedder)
        return embedder
    arguments = training_arguments(config)
    loss = dict(config.loss)
    teacher = loss["teacher"] = None if loss.get("teacher") is None else Teacher(**loss["teacher"])
    pairs = load_pairs(config.data["train"], **config.pairs)
    steps = count_steps(pairs, arguments, arguments.world_size)
    held_out = None
    if config.data.get("eval"):
        held_out = load_pairs(config.data["eval"], **{k: v for k, v in config.pairs.items() if k != "limit"})
    if teacher is not None:
        pairs, held_out = teacher.number(pairs), held_out and teacher.number(held_out)
    evaluator = _dev(config.dev)
    set_seed(arguments.seed)  # before the pool and LoRA are drawn
    embedder = load(config.model, **config.options)
    if config.lora is not None:
        add_lora(embedder, **config.lora)
    prepare(embedder)
    if first:
        print(plan(config, embedder, pairs, steps), flush=True)
    arguments.prompts = column_prompts(embedder, pairs.column_names)
    arguments.learning_rate_mapping |= _pool_rate(config, embedder)
    with _removed_if_empty(output):
        trainer = EmbedderTrainer(
            model=embedder,
            args=arguments,
            train_dataset=pairs,
            eval_dataset=held_out,
            loss=InfoNCE(embedder, **loss),
            evaluator=evaluator,
            callbacks=[_Begun(config)],
        )
        if dry_run:
            next(iter(trainer.get_train_dataloader()))
            trainer.create_optimizer()
            return embedder
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(output))
        trainer.save_state()  # the last file: see `_finished`
    trainer.accelerator.unwrap_model(embedder, keep_fp32_wrapper=False)  # of its autocast: it embeds as if loaded
    return embedder


class _Begun(TrainerCallback):
    """Notes the config when the first step is made: a run that fails before it leaves nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self._config: TrainConfig | None = config

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._config is not None and state.is_world_process_zero:
            output = Path(args.output_dir)
            (output / STATE).unlink(missing_ok=True)  # of an earlier run that was finished
            write_text(output / CONFIG, yaml.safe_dump(self._config.as_dict(), sort_keys=False, allow_unicode=True))
        self._config = None


@contextmanager
def _removed_if_empty(output: Path) -> Iterator[None]:
    """The trainer makes the folder when it is made itself."""
    existed = output.exists()
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):  # not empty
                output.rmdir()


def training_arguments(config: TrainConfig) -> Any:
    """SentenceTransformerTrainingArguments of a config."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    values = {**DEFAULTS, "ddp_find_unused_parameters": False, **config.arguments}
    if not torch.accelerator.is_available() and not is_torch_xla_available():
        values["use_cpu"] = True  # transformers wants it said for bfloat16, and to pin no memory
    return SentenceTransformerTrainingArguments(**values)


def _pool_rate(config: TrainConfig, embedder: Embedder) -> dict[str, float]:
    """Learning rates of the pool's parameters, by patterns of which the later count: its own, or as the config says."""
    rate, place, pool = config.pooler_learning_rate, r"\bpooler\.pool\.", embedder[1].pool
    own: Mapping[str, float] = pool.learning_rates  # type: ignore[union-attr, assignment]
    if not any(parameter.requires_grad for parameter in embedder[1].parameters()):
        if rate is not None:
            backbone: Any = embedder[0]
            log_once(f"{backbone.design} has no pool to train: pooler_learning_rate is not used")
        return {}
    if rate is None:
        return {place + re.escape(name): value for name, value in own.items()}
    # The parts of a pool keep their proportion.
    return {place + re.escape(name): rate * value / own[""] for name, value in own.items()} or {place: rate}


def plan(config: TrainConfig, embedder: Embedder, pairs: Any, steps: Steps) -> str:
    """What is about to be trained, as text: data, parameters, steps, batch."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    a_device = config.arguments.get("per_device_train_batch_size", 8)  # of transformers, where nothing is said
    accumulated = config.arguments.get("gradient_accumulation_steps", 1)
    update = a_device * world * accumulated
    short = "" if steps.made == steps.asked else f" (of {steps.asked}: repeated texts leave fewer batches)"
    counts = {"pool": 0, "LoRA": 0, "backbone": 0, "frozen": 0}
    for name, parameter in embedder.named_parameters():
        kind = "pool" if name.startswith("pooler.") else "LoRA" if "lora_" in name else "backbone"
        counts[kind if parameter.requires_grad else "frozen"] += parameter.numel()
    columns = len(text_columns(pairs.column_names)) - 1
    across = world if config.loss.get("gather_across_devices") else 1
    negatives = a_device * across * columns - 1
    backbone: Any = embedder[0]
    return "\n".join(
        [
            str(pairs.info.description or ""),
            describe(pairs, embedder.tokenizer, backbone.max_seq_length),
            f"design      {backbone.design} on {config.model}",
            "parameters  " + ", ".join(f"{count / 1e6:.2f} M {kind}" for kind, count in counts.items() if count),
            f"batch       {update} = {a_device} a device x {world} x {accumulated} accumulated; "
            f"{negatives} negatives an anchor",
            f"steps       {steps.made}{short}, about {steps.made * update / len(pairs):.2f} times through the data",
        ]
    )


def column_prompts(embedder: Embedder, columns: Sequence[str]) -> dict[str, str] | None:
    """The stored prompts as the columns' prompts: query for anchors, document for the rest."""
    query, document = (embedder.prompts.get(name) or "" for name in ("query", "document"))
    prompts = {name: query if name == "anchor" else document for name in text_columns(columns)}
    return {name: prompt for name, prompt in prompts.items() if prompt} or None


def _dev(path: str | None) -> Any:
    if path is None:
        return None
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    first, second, scores = zip(*load_scored(path), strict=True)
    return EmbeddingSimilarityEvaluator(list(first), list(second), list(scores), name="dev")


def load_scored(path: str | Path) -> list[tuple[str, str, float]]:
    """sentence1, sentence2 and score of a JSONL file of scored pairs.

    Raises:
        FileNotFoundError: no such file. ValueError: a line without them, named; no line at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no dev file {path}; expected JSONL with sentence1, sentence2, score")
    rows = []
    for part in open_source(Path(path), "dev"):
        for number, row in part.read(None):
            try:
                if isinstance(row, BadRow):
                    raise row
                (first,), (second,) = (texts_of(row[name], name) for name in ("sentence1", "sentence2"))
                score = float(row["score"])
                if not math.isfinite(score):
                    raise ValueError(f"score is {score}")
                rows.append((first, second, score))
            except (ValueError, KeyError, TypeError, OverflowError, BadRow) as error:
                why = error.detail if isinstance(error, BadRow) else error
                raise ValueError(f"{part.at(number)} has no sentence1, sentence2 and score: {why}") from error
    if len({score for _, _, score in rows}) < 2:
        raise ValueError(
            f"{path} has {len(rows)} rows with {len({score for _, _, score in rows})} different scores; a correlation "
            "with them needs two at least"
        )
    return rows


def _finished(output: Path) -> bool:
    """Whether a training came to its end: its last file is there, and the embedder before it."""
    try:
        read_json(output / STATE)
    except (FileNotFoundError, ValueError):
        return False
    return (output / "modules.json").is_file()


def _checkpoint(config: TrainConfig, output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or an error where going on is not what was asked."""
    checkpoints = any(output.glob("checkpoint-*"))
    if checkpoints and not resume:
        raise ValueError(
            f"{output} holds checkpoints of an earlier run; pass --resume to go on from the last, or another output_dir"
        )
    if resume and (checkpoints or _finished(output)) and (output / CONFIG).is_file():
        try:
            before = read_yaml(output / CONFIG)
        except ValueError as error:
            raise ValueError(f"{error}; delete it to resume without comparing configs") from error
        now = yaml.safe_load(yaml.safe_dump(config.as_dict()))
        changed = [k for k in sorted({*before, *now} - _FREE, key=str) if before.get(k) != now.get(k)]
        if changed:
            pairs = ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)
            raise ValueError(f"cannot resume {output} with another config: {pairs}; use another output_dir")
    found = last_checkpoint(output)
    if found is None and checkpoints:
        logger.warning("no checkpoint in %s is whole; starting from the beginning", output)
    return found
