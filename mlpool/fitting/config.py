"""The YAML config of `mlpool fit`: read and checked before anything is loaded, as that of `mlpool train`."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .. import schema
from ..embedder.loading import load
from ..pooling.registry import find_pool
from ..training.config import NONE, ONE, SEED, SHORT
from ..training.data import load_pairs
from ..training.losses import InfoNCE


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pool to try, at one learning rate.

    Attributes:
        name: in tables. pool: its class's name, None for the design's. pooler: as of `mlpool.load`.
    """

    name: str
    pool: str | None
    pooler: str | Mapping[str, Any]
    learning_rate: float


@dataclass
class FitConfig:
    """A checked config.

    Attributes:
        model: base model or saved embedder. options: of `mlpool.load`, but `pooler`. output_dir: a folder.
        candidates: pools by learning rates. seeds: each candidate is trained with each.
        data: of `load_pairs`, with "train". dev: JSONL files of sentence1, sentence2, score; the mean Spearman decides.
        test: files alike, which decide nothing: their mean stands beside it in the table.
        loss: of `InfoNCE`. states: the folder of the kept states, None for one in output_dir.
        batch_size: pairs a step. max_steps, warmup_steps, weight_decay: of AdamW, the rate falling to 0.
    """

    model: str
    output_dir: str
    candidates: list[Candidate]
    data: dict[str, Any]
    dev: list[str]
    test: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    states: str | None = None
    batch_size: int = 96
    max_steps: int = 150
    warmup_steps: int = 15
    weight_decay: float = 0.01

    @property
    def pairs(self) -> dict[str, Any]:
        """The options of `load_pairs`."""
        return {name: value for name, value in self.data.items() if name != "train"}


def read_fit_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> FitConfig:
    """Read and check a config.

    Args:
        source: a YAML file, or its content. Keys: those of `FitConfig`, and options of `mlpool.load` beside them.
            A candidate has `pooler` (as in mlpool.load), `pool` (a registered pool in place of the design's own),
            `learning_rate` (one or a list) and `name`. seeds: a list, or how many.
        overrides: "--key value" words.

    Raises:
        FileNotFoundError: no such file. ValueError: as of `training.config.read_config`; LoRA, which is not fit's.
    """
    values = schema.read_config(source, overrides, SHORT)
    if values.get("lora"):
        raise ValueError(
            "lora is for `mlpool train`: fit trains the pool alone, on states of a frozen base. Leave lora out, and go "
            "on from the folder that fit makes: mlpool train … --model OUTPUT_DIR --lora true"
        )
    values.pop("lora", None)
    if "data" in values and type(values["data"]) is not dict:
        values["data"] = {"train": values["data"]}
    values = schema.check(_keys(), values)
    lacking = [name for name in ("model", "output_dir", "dev", "candidates") if not values.get(name)]
    if lacking or not values.get("data", {}).get("train"):
        raise ValueError(f"the config lacks {', '.join(lacking or ['data'])}; see configs/fit/smollm2.yaml")
    seeds, rate = values.get("seeds", 1), values.pop("learning_rate", None)
    for name in ("dev", "test"):
        values[name] = [values[name]] if isinstance(values.get(name), str) else values.get(name) or []
    values["seeds"] = list(range(seeds)) if isinstance(seeds, int) else seeds
    values["candidates"] = [c for given in values["candidates"] for c in _candidates(given, rate)]
    known = [asdict(candidate) for candidate in values["candidates"]]
    if doubled := [one["name"] for i, one in enumerate(known) if one in known[:i]]:
        raise ValueError(f"candidates has {doubled[0]} twice")
    options = {name: values.pop(name) for name in list(values) if name in _options()}
    return FitConfig(**{name: value for name, value in values.items() if value is not None}, options=options)


def _candidates(given: Mapping[str, Any], rate: Any) -> list[Candidate]:
    """One for each learning rate."""
    pool, pooler = given.get("pool"), given.get("pooler", "default")
    if pool is not None:
        find_pool(pool)
    rates = given.get("learning_rate", rate)
    if rates is None:
        raise ValueError(f"the candidate {dict(given)} has no learning_rate, nor has the config one for all")
    words = [f"{key} {value}" for key, value in pooler.items()] if isinstance(pooler, Mapping) else [pooler]
    name = given.get("name") or ", ".join([*([pool] if pool else []), *words])
    return [Candidate(name, pool, pooler, float(r)) for r in (rates if isinstance(rates, list) else [rates])]


_RATE = Annotated[float, Field(gt=0)]


@functools.cache
def _options() -> dict[str, Any]:
    return schema.arguments(load, "model", "pooler")


@functools.cache
def _keys() -> Any:
    """The type of a config."""
    rate: Any = _RATE
    rates: Any = rate | Annotated[list[rate], Field(min_length=1)]
    candidate: Any = schema.section(
        "key in candidates",
        {"name": str, "pool": str, "pooler": schema.arguments(load)["pooler"], "learning_rate": rates},
    )
    pairs = {**schema.arguments(load_pairs, "source", "scores"), "train": Any}
    return schema.section(
        "config key",
        _options()
        | {
            "model": str, "output_dir": str, "states": str | None, "learning_rate": rates,
            "candidates": list[candidate], "data": schema.section("key in data", pairs), "dev": str | list[str],
            "test": str | list[str] | None, "seeds": ONE | Annotated[list[SEED], Field(min_length=1)],
            "loss": schema.section("key in loss", schema.arguments(InfoNCE, "model", "teacher")) | None,
            "batch_size": Annotated[int, Field(ge=2)], "max_steps": ONE,
            "warmup_steps": NONE, "weight_decay": Annotated[float, Field(ge=0)],
        },
    )  # fmt: skip
