"""The YAML config of `mlpool train`: read, overridden from the command line, and checked before anything is loaded."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import AfterValidator, BeforeValidator, Field, Strict
from sentence_transformers import SentenceTransformerTrainingArguments

from .. import schema
from ..embedder.adapters import add_lora
from ..embedder.loading import load
from .data import load_pairs
from .losses import InfoNCE
from .mixture import Batches, Temperature, read_sources
from .teacher import Teacher

# What `mlpool train` decides otherwise than transformers; a config may say it all the same.
DEFAULTS: dict[str, Any] = {
    "batch_sampler": "no_duplicates",  # a text twice in a batch would be its own negative
    "dataloader_drop_last": True,
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,  # the trainer stops there
    "report_to": "none",
}
_OURS = ("model", "lora", "data", "loss", "pooler_learning_rate", "dev")
SHORT = {"data": "train"}  # data: x is data: {train: x}


@dataclass
class TrainConfig:
    """A checked config.

    Attributes:
        model: base model or saved embedder. options: of `mlpool.load`. lora: of `add_lora`, or None for all weights.
        data: of `load_mixture`: "train" and maybe "eval", how sources are mixed, options of `load_pairs`. loss: of
            `InfoNCE`.
        pooler_learning_rate: of the pool, whose own rates (`Pool.learning_rates`) keep their proportion. None for its
            own, or that of the rest where it has none; not used where there is no pool to train.
        dev: a JSONL file of sentence1, sentence2, score, evaluated with eval_strategy (Spearman, "dev_...").
        arguments: of SentenceTransformerTrainingArguments.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    pooler_learning_rate: float | None = None
    dev: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The flat form, as it may be written in YAML."""
        ours = {name: getattr(self, name) for name in _OURS}
        # An empty `lora` is LoRA as it is by default; without the key all weights are trained.
        nested = {name: value for name, value in ours.items() if value is not None and (value != {} or name == "lora")}
        return {**nested, **self.options, **self.arguments}


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check a config.

    Args:
        source: a YAML file, or its content. Keys: model, data and loss; lora; options of `mlpool.load` (design, pooler,
            max_seq_length, prompts, …); Hugging Face's training arguments (learning_rate, max_steps, …).
        overrides: "--key value" or "--key=value" as on a command line; nested keys by dots, values as in YAML.

    Raises:
        FileNotFoundError: no such file. ValueError: no valid YAML, unknown keys (with the nearest known), values that
            do not fit, a missing model, data or output_dir.
    """
    values = checked(schema.read_config(source, overrides, SHORT))
    missing = [name for name in ("model", "output_dir") if not values.get(name)]
    if missing or not values.get("data", {}).get("train"):
        raise ValueError(f"the config lacks {', '.join(missing or ['data'])}; see configs/quick.yaml for the least")
    if isinstance(values.get("lora"), bool):
        values["lora"] = {} if values["lora"] else None
    ours = {name: values.pop(name) for name in _OURS if name in values}
    ours = {name: value for name, value in ours.items() if value is not None}
    _check_teacher(ours)
    options = {name: values.pop(name) for name in list(values) if name in _options()}
    return TrainConfig(**ours, options=options, arguments=values)


def _check_teacher(values: Mapping[str, Any]) -> None:
    """A teacher has one source, and what is read of one has a teacher."""
    teacher, scores = values.get("loss", {}).get("teacher"), values["data"].get("scores")
    if teacher is None and scores is not None:
        raise ValueError(f"data.scores is {scores!r}, but no loss uses it; add loss: {{teacher: {{weight: 0.5}}}}")
    if teacher is not None and (scores is None) == (teacher.get("embeddings") is None):
        raise ValueError(
            "loss.teacher needs data.scores, the column of its scores, or loss.teacher.embeddings, a folder of `mlpool "
            f"mine --embeddings`; got {'neither' if scores is None else 'both'}"
        )


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as their keys have them ("1e-5" a number), `data` as a section; ValueError as of `read_config`."""
    values = dict(values)
    if "data" in values and type(values["data"]) is not dict:
        values["data"] = {"train": values["data"]}
    fitting: dict[str, Any] = schema.check(_keys(), values)
    for which in ("train", "eval"):
        if which in fitting.get("data", {}):
            read_sources(fitting["data"][which], which)
    return fitting


# --- what fits --------------------------------------------------------------------------------------------------------

ONE, NONE = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
SEED = Annotated[int, Field(ge=0, lt=2**32)]
_RATE = Annotated[float, Field(ge=0)]


def _steps(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("a number of at least 1, or -1 to go by num_train_epochs")
    return value


def _device(value: str) -> str:
    try:
        torch.empty(0, device="none" if value == "meta" else value)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"a device of this machine, such as cpu or cuda ({str(error).splitlines()[0]})") from None
    return value


def _source(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        raise ValueError("a path, a Hub data set's name, or a list of these or of rows")
    return value


# Narrower than the signatures and the training arguments say.
_LIMITS: dict[str, Any] = {
    "per_device_train_batch_size": ONE, "per_device_eval_batch_size": ONE, "gradient_accumulation_steps": ONE,
    "max_seq_length": ONE | None, "max_steps": Annotated[int, AfterValidator(_steps)],
    "num_train_epochs": Annotated[float, Field(gt=0)], "learning_rate": _RATE, "weight_decay": _RATE,
    "warmup_steps": _RATE, "dataloader_num_workers": NONE, "seed": SEED, "data_seed": SEED | None,
    "device": Annotated[str, AfterValidator(_device)] | None,
    "dtype": Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        BeforeValidator(lambda value: str(value).removeprefix("torch.")),
    ],
}  # fmt: skip


@functools.cache
def _options() -> dict[str, Any]:
    return schema.arguments(load, "model")


@functools.cache
def _keys() -> Any:
    """The type of a config."""
    hints = get_type_hints(SentenceTransformerTrainingArguments)
    source = Annotated[Any, AfterValidator(_source)]
    pairs = {**schema.arguments(load_pairs, "source", "split"), "train": source, "eval": source}
    pairs |= {"temperature": Temperature, "batches": Batches}
    teacher = schema.section("key in loss.teacher", schema.arguments(Teacher)) | None
    keys = {f.name: hints[f.name] for f in fields(SentenceTransformerTrainingArguments)}
    del keys["multi_dataset_batch_sampler"]  # `data` says it
    keys |= _options() | {
        "model": str,
        "lora": Annotated[bool, Strict()]
        | schema.section("key in lora", schema.arguments(add_lora, "embedder"))
        | None,
        "data": schema.section("key in data", pairs),
        "loss": schema.section("key in loss", {**schema.arguments(InfoNCE, "model", "teacher"), "teacher": teacher})
        | None,
        "pooler_learning_rate": _RATE | None,
        "dev": str | None,
    }
    return schema.section("config key", keys | _LIMITS)
