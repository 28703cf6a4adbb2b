"""`mlpool train`: data, model, loss and trainer from one config; resumable."""

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
from datasets import DatasetDict
from datasets.config import HF_DATASETS_CACHE
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import TrainerCallback, set_seed
from transformers.utils import is_torch_xla_available

from ..corpus.rows import BadRow
from ..corpus.sources import open_source
from ..embedder import Embedder, add_lora, load
from ..embedder.calibration import ENOUGH, calibrate
from ..embedder.folder import recover
from ..files import check_folder_name, read_json, write_text
from ..pooling.base import log_once
from ..schema import read_yaml
from .columns import column_prompts, texts_of
from .config import DEFAULTS, TrainConfig, read_config
from .losses import InfoNCE
from .mixture import Mixture, load_mixture
from .steps import Steps
from .teacher import Teacher
from .tokens import KeptTokens, TokenCollator, keep_tokens
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
    mixture = load_mixture(config.data)
    steps = mixture.count_steps(arguments, arguments.world_size)
    mixtures = [mixture, load_mixture(config.data, "eval")] if config.data.get("eval") else [mixture]
    teacher = None if config.loss.get("teacher") is None else Teacher(**config.loss["teacher"])
    if teacher is not None:
        for source in (source for each in mixtures for source in each.sources):
            source.pairs = teacher.number(source.pairs)
    evaluator = _dev(config.dev)
    set_seed(arguments.seed)  # before the pool and LoRA are drawn
    embedder = begin(config)
    with arguments.main_process_first(desc="tokenizing"):  # the others find what it kept
        collator = collate_kept(embedder, mixtures, config.data.get("cache_dir"))
    if first:
        print(plan(config, embedder, mixture, steps, collator), flush=True)
    pairs = mixture.dataset()
    if isinstance(pairs, DatasetDict):
        arguments.multi_dataset_batch_sampler = mixture.sampler(
            arguments.per_device_train_batch_size, arguments.world_size
        )
    # The collator puts them before the texts; the trainer names each row's source only where it has prompts by source.
    named = {name: prompts for name, prompts in collator.of_sources.items() if name}
    arguments.prompts = named or collator.of_sources[""] or None
    arguments.learning_rate_mapping |= _pool_rate(config, embedder)
    loss = InfoNCE(embedder, **{**config.loss, "teacher": teacher})
    with _removed_if_empty(output):
        trainer = EmbedderTrainer(
            model=embedder,
            args=arguments,
            train_dataset=pairs,
            eval_dataset=mixtures[1].dataset() if len(mixtures) > 1 else None,
            data_collator=collator,
            loss=loss,
            evaluator=evaluator,
            callbacks=[_Begun(config)],
        )
        if dry_run:
            next(iter(trainer.get_train_dataloader()))
            trainer.create_optimizer()
            return embedder
        if checkpoint is None:
            calibrate_start(embedder, mixture)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(output))
        trainer.save_state()  # the last file: see `_finished`
        if first:
            print(f"{output}: {loss.counts}", flush=True)
    trainer.accelerator.unwrap_model(embedder, keep_fp32_wrapper=False)  # of its autocast: it embeds as if loaded
    return embedder


def begin(config: TrainConfig) -> Embedder:
    """The embedder at step 0."""
    embedder = load(config.model, **config.options)
    if config.lora is not None:
        add_lora(embedder, **config.lora)
    prepare(embedder)
    return embedder


def calibrate_start(embedder: Embedder, mixture: Mixture) -> None:
    """Where the pool whitens and is at its start: by texts of the training."""
    if embedder.pooler.pool.uncalibrated:
        calibrate(embedder, mixture.texts(ENOUGH * embedder.backbone.hidden_size, embedder.prompts))


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
    values = {**DEFAULTS, "ddp_find_unused_parameters": False, **config.arguments}
    if not torch.accelerator.is_available() and not is_torch_xla_available():
        values["use_cpu"] = True  # transformers wants it said for bfloat16, and to pin no memory
    arguments = SentenceTransformerTrainingArguments(**values)
    if arguments.device.type == "cpu":
        # Each of several processes has "cpu:0", where torch restores no optimizer; transformers 5.17 asks it to.
        arguments._setup_devices = torch.device("cpu")
    return arguments


def _pool_rate(config: TrainConfig, embedder: Embedder) -> dict[str, float]:
    """Learning rates of the pool's parameters, by patterns of which the later count: its own, or as the config says."""
    rate, pool = config.pooler_learning_rate, embedder.pooler.pool
    if not any(parameter.requires_grad for parameter in pool.parameters()):
        if rate is not None:
            log_once(f"{embedder.backbone.design} has no pool to train: pooler_learning_rate is not used")
        return {}
    return {r"\bpooler\.pool\." + re.escape(part): value for part, value in pool.rates(rate).items()}


def plan(config: TrainConfig, embedder: Embedder, mixture: Mixture, steps: Steps, collator: TokenCollator) -> str:
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
    across = world if config.loss.get("gather_across_devices") else 1
    negatives = sorted({a_device * across * (len(source.columns) - 1) - 1 for source in mixture.sources})
    return "\n".join(
        [
            mixture.describe(collator.uncut, embedder.backbone.max_seq_length),
            f"design      {embedder.backbone.design} on {config.model}",
            "parameters  " + ", ".join(f"{count / 1e6:.2f} M {kind}" for kind, count in counts.items() if count),
            f"batch       {update} = {a_device} a device x {world} x {accumulated} accumulated; "
            f"{' to '.join(map(str, negatives[:: max(1, len(negatives) - 1)]))} negatives an anchor",
            f"steps       {steps.made}{short}, about {steps.made * update / mixture.size:.2f} times through the data",
        ]
    )


def collate_kept(embedder: Embedder, mixtures: Sequence[Mixture], cache_dir: Any = None) -> TokenCollator:
    """Keep the tokens of all texts, each source's by itself, under the prompts that their columns have."""
    folder = Path(cache_dir or HF_DATASETS_CACHE) / "mlpool-tokens"
    kept: dict[str, list[KeptTokens]] = {}
    prompts: dict[str, dict[str, str]] = {}
    for source in (source for mixture in mixtures for source in mixture.sources):
        own = source.column_prompts(embedder.prompts)
        if prompts.setdefault(source.name, own) != own:
            raise ValueError(f"the source {source.name!r} has other prompts in data.eval than in data.train; rename it")
        for prompt in dict.fromkeys(own.get(column, "") for column in source.columns):
            columns = [(source.pairs, column) for column in source.columns if own.get(column, "") == prompt]
            kept.setdefault(prompt, []).append(keep_tokens(embedder.backbone, columns, prompt, folder))
    everywhere = {column for mixture in mixtures for source in mixture.sources for column in source.columns}
    prompts.setdefault("", column_prompts(embedder.prompts, sorted(everywhere)))
    return TokenCollator(kept, prompts, embedder.backbone)


def _dev(path: str | None) -> Any:
    if path is None:
        return None
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    first, second, scores = zip(*load_scored(path), strict=True)
    return EmbeddingSimilarityEvaluator(list(first), list(second), list(scores), name="dev")


def load_scored(path: str | Path) -> list[tuple[str, str, float]]:
    """sentence1, sentence2 and score of a JSONL file of scored pairs; a line without them is named in the error."""
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
    with suppress(FileNotFoundError, ValueError):
        read_json(output / STATE)
        return (output / "modules.json").is_file()
    return False


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
