"""`mlpool train`: data, model, loss and trainer from one config; resumable."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed

from ..embedder import Embedder, add_lora, load
from ..embedder.folder import recover
from .config import DEFAULTS, TrainConfig, read_config
from .data import describe, load_pairs
from .losses import InfoNCE
from .trainer import EmbedderTrainer, last_checkpoint, prepare

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
        resume: go on from the last whole checkpoint of output_dir; from the start where there is none.
        dry_run: load and check everything, print data, parameters and steps, and stop.

    Writes checkpoint-N folders, the trained embedder and the config into output_dir.

    Raises:
        ValueError: a wrong config or data (lines named); checkpoints in output_dir without `resume`; `resume` with a
            config that differs in what matters.
    """
    config = config if isinstance(config, TrainConfig) else read_config(config, overrides)
    output = Path(config.arguments["output_dir"])
    recover(output)
    checkpoint = _checkpoint(config, output, resume)
    data = {name: value for name, value in config.data.items() if name not in ("train", "eval")}
    pairs = load_pairs(config.data["train"], **data)
    held_out = None
    if config.data.get("eval"):
        held_out = load_pairs(config.data["eval"], **{k: v for k, v in data.items() if k != "limit"})
    set_seed(int(config.arguments.get("seed", 42)))  # before the pool and LoRA are drawn
    embedder = load(config.model, **config.options)
    if config.lora is not None:
        add_lora(embedder, **config.lora)
    prepare(embedder)
    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        print(plan(config, embedder, pairs), flush=True)
    if dry_run:
        return embedder
    arguments = training_arguments(config)
    arguments.prompts = _column_prompts(embedder, pairs.column_names)
    trainer = EmbedderTrainer(
        model=embedder,
        args=arguments,
        train_dataset=pairs,
        eval_dataset=held_out,
        loss=InfoNCE(embedder, **config.loss),
        evaluator=_dev(config.dev),
    )
    if first:
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG).write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_state()
    trainer.save_model(str(output))
    trainer.accelerator.unwrap_model(embedder, keep_fp32_wrapper=False)  # of its autocast: it embeds as if loaded
    return embedder


def training_arguments(config: TrainConfig) -> Any:
    """SentenceTransformerTrainingArguments of a config."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    values = {**DEFAULTS, "ddp_find_unused_parameters": False, **config.arguments}
    for name, value in values.items():
        if name in ("learning_rate", "weight_decay", "warmup_ratio") and isinstance(value, str):
            values[name] = float(value)  # YAML reads 1e-5 as a string
    if config.pooler_learning_rate is not None:
        values["learning_rate_mapping"] = {
            **(values.get("learning_rate_mapping") or {}), r"\bpooler\.pool\.": float(config.pooler_learning_rate),
        }  # fmt: skip
    return SentenceTransformerTrainingArguments(**values)


def plan(config: TrainConfig, embedder: Embedder, pairs: Any) -> str:
    """What is about to be trained, as text: data, parameters, steps, batch."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    a_device = int(config.arguments.get("per_device_train_batch_size", 8))  # of transformers, where nothing is said
    accumulated = int(config.arguments.get("gradient_accumulation_steps", 1))
    update = a_device * world * accumulated
    epochs, steps = float(config.arguments.get("num_train_epochs", 3)), int(config.arguments.get("max_steps", -1))
    steps = steps if steps > 0 else int(len(pairs) / update * epochs)
    counts = {"pool": 0, "LoRA": 0, "backbone": 0, "frozen": 0}
    for name, parameter in embedder.named_parameters():
        kind = "pool" if name.startswith("pooler.") else "LoRA" if "lora_" in name else "backbone"
        counts[kind if parameter.requires_grad else "frozen"] += parameter.numel()
    columns = len(pairs.column_names) - 1
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
            f"steps       {steps}, about {steps * update / max(1, len(pairs)):.2f} times through the data",
        ]
    )


def _column_prompts(embedder: Embedder, columns: Sequence[str]) -> dict[str, str] | None:
    """The stored prompts as the columns' prompts: query for anchors, document for the rest."""
    query, document = (embedder.prompts.get(name) or "" for name in ("query", "document"))
    prompts = {name: query if name == "anchor" else document for name in columns}
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
        FileNotFoundError: no such file. ValueError: a line without them, named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no dev file {path}; expected JSONL with sentence1, sentence2, score")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["sentence1"], row["sentence2"], float(row["score"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} has no sentence1, sentence2 and score: {error}") from error
    return rows


def _checkpoint(config: TrainConfig, output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or an error where going on is not what was asked."""
    if not any(output.glob("checkpoint-*")):
        return None
    if not resume:
        raise ValueError(
            f"{output} holds checkpoints of an earlier run; pass --resume to go on from the last, or another output_dir"
        )
    if (output / CONFIG).is_file():
        before, now = yaml.safe_load((output / CONFIG).read_text()), yaml.safe_load(yaml.safe_dump(config.as_dict()))
        changed = [k for k in sorted({*before, *now} - _FREE) if before.get(k) != now.get(k)]
        if changed:
            pairs = ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)
            raise ValueError(f"cannot resume {output} with another config: {pairs}; use another output_dir")
    found = last_checkpoint(output)
    if found is None:
        logger.warning("no checkpoint in %s is whole; starting from the beginning", output)
    return found
