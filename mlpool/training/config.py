"""The YAML config of `mlpool train`: read, overridden from the command line, and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..embedder.adapters import add_lora
from ..embedder.loading import load
from .data import load_pairs
from .losses import InfoNCE

# What `mlpool train` decides otherwise than transformers; a config may say it all the same.
DEFAULTS: dict[str, Any] = {
    "batch_sampler": "no_duplicates",  # a text twice in a batch would be its own negative
    "dataloader_drop_last": True,
    "logging_steps": 10,
    "logging_first_step": True,
    "report_to": "none",
}
_OURS = ("model", "lora", "data", "loss", "pooler_learning_rate", "dev")


@dataclass
class TrainConfig:
    """A checked config.

    Attributes:
        model: base model or saved embedder. options: of `mlpool.load`. lora: of `add_lora`, or None for all weights.
        data: of `load_pairs`, with "train" and maybe "eval" sources. loss: of `InfoNCE`.
        pooler_learning_rate: of the pool, None for that of the rest.
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
        nested = {name: getattr(self, name) for name in _OURS if getattr(self, name) not in (None, {})}
        return {**nested, **self.options, **self.arguments}


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check a config.

    Args:
        source: a YAML file, or its content. Keys: model, data and loss; lora; options of `mlpool.load` (design, pooler,
            max_seq_length, prompts, …); Hugging Face's training arguments (learning_rate, max_steps, …).
        overrides: "--key value" or "--key=value" as on a command line; nested keys by dots, values as in YAML.

    Raises:
        FileNotFoundError: no such file. ValueError: no valid YAML, unknown keys (with the nearest known), a missing
            model, data or output_dir.
    """
    values = _read_yaml(Path(source)) if isinstance(source, str | Path) else _copy(source)
    for keys, value in _parse(overrides):
        _set(values, keys, value)
    known = _known()
    for name in values:
        if name not in known["config"]:
            raise ValueError(_unknown("config key", name, known["config"]))
    data = values.get("data")
    values["data"] = dict(data) if isinstance(data, Mapping) else {"train": data}
    if isinstance(values.get("lora"), bool):
        values["lora"] = {} if values["lora"] else None
    for section in ("data", "loss", "lora"):
        for name in values.get(section) or {}:
            if name not in known[section]:
                raise ValueError(_unknown(f"key in {section}", name, known[section]))
    missing = [name for name in ("model", "output_dir") if not values.get(name)]
    if missing or not values["data"].get("train"):
        raise ValueError(f"the config lacks {', '.join(missing or ['data'])}; see configs/quick.yaml for the least")
    ours = {name: values.pop(name) for name in _OURS if name in values}
    ours = {name: value for name, value in ours.items() if value is not None}
    options = {name: values.pop(name) for name in list(values) if name in known["options"]}
    return TrainConfig(**ours, options=options, arguments=values)


def _known() -> dict[str, list[str]]:
    from sentence_transformers import SentenceTransformerTrainingArguments

    def parameters(function: Any, *without: str) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name not in without]

    options = parameters(load, "model")
    arguments = [f.name for f in dataclasses.fields(SentenceTransformerTrainingArguments)]
    return {
        "options": options,
        "config": [*_OURS, *options, *arguments],
        "data": ["train", "eval", *parameters(load_pairs, "source", "split")],
        "loss": parameters(InfoNCE, "model"),
        "lora": parameters(add_lora, "embedder"),
    }


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"unknown {what} {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no config {path}; see configs/ for ready ones")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values


def _parse(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """["--loss.temperature", "0.02", "--bf16"] → [(["loss", "temperature"], 0.02), (["bf16"], True)]."""
    parsed: list[tuple[list[str], Any]] = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        parsed.append((key.replace("-", "_").split("."), _value(value)))
    return parsed


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML reads 1e-5 as a string, for want of a point
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            # `data: path` and `lora: true` are short forms
            inner = {"train": inner} if key == "data" and inner else {}
        values[key] = inner
        values = inner
    values[keys[-1]] = value


def _copy(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in source.items()}
