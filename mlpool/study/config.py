"""The YAML config of `mlpool study`, and the runs it means."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..embedder.designs import Design, find_design
from ..evaluation.local import SPLITS
from ..options import check_place
from ..schema import check, copied, nearest, put, read_config, section
from ..training.config import SHORT, checked
from ..training.config import read_config as read_training

# Short runs write no checkpoint: one that is killed starts anew. With save_steps it goes on from its last.
DEFAULTS: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True}
_HASHED_WHOLE = 2**28  # bytes; of larger files the size alone
UNTRAINED = "{} (untrained)"
_TASKS = list[str] | None
_SEARCH = section("key in search", {
    "grid": dict[str, Annotated[list[Any], Field(min_length=1)]], "per": Literal["design", "family", "shared"],
    "max_steps": int | None, "tasks": _TASKS, "split": str,
})  # fmt: skip
_EVALUATE = section("key in evaluate", {"tasks": _TASKS, "split": str, "bf16": bool})
_KEYS = section("key in the study's config", {
    "title": str, "base": str | None, "data_dir": str | None, "output": str | None, "data": Any,
    "train": dict[str, Any] | None, "designs": list[str | int | dict[str, Any]] | None, "seeds": list[int] | None,
    "evaluate": _EVALUATE | None, "baseline": str | None, "search": _SEARCH | None, "match_parameters": bool,
    "untrained": bool, "keep_models": bool,
})  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: a design with what is special about it.

    label: unique. train: config of `mlpool train` without seed and output_dir. match: label of the entry whose number
    of trainable parameters it is given, or None.
    """

    label: str
    design: Design
    train: dict[str, Any]
    match: str | None = None

    @property
    def family(self) -> str:
        """What shares a learning rate: designs whose pools start and train alike."""
        if not self.design.trainable:
            return "no trainable pool"
        if not self.design.has_latents:
            return "layer weights"
        pooler = self.train.get("pooler", "default")
        released = pooler == "paper" or (isinstance(pooler, Mapping) and pooler.get("residual") is False)
        return "released equations" if released else "residual pool"


@dataclass(frozen=True)
class Run:
    """One training with its evaluation. kind: "search", "seed" or "untrained". folder: relative to the output."""

    label: str
    kind: str
    seed: int
    train: dict[str, Any]
    tasks: list[str] | None
    split: str
    data_dir: str
    bf16: bool
    inputs: dict[str, str]
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """All that decides its numbers."""
        evaluate: dict[str, Any] = {"tasks": self.tasks, "split": self.split, "data_dir": self.data_dir}
        if self.bf16:
            evaluate["bf16"] = True
        config = {"train": {**self.train, "seed": self.seed}, "evaluate": evaluate, "inputs": self.inputs}
        return json.loads(json.dumps(config, default=str))

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Study:
    """A checked config: see configs/study/ for commented ones."""

    base: str
    data_dir: str
    output: Path
    entries: list[Entry]
    seeds: list[int]
    tasks: list[str] | None
    split: str
    baseline: str
    title: str = "Which pooling, which attention?"
    bf16: bool = False  # evaluate under autocast
    search: dict[str, Any] = field(default_factory=dict)
    match_parameters: bool = False
    untrained: bool = True
    keep_models: bool = False
    source: dict[str, Any] = field(default_factory=dict)  # as it was written, overrides applied
    inputs: dict[str, str] = field(default_factory=dict)  # files it reads, and what was in them

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The recipes that the search tries: every combination of the grid."""
        grid = self.search["grid"]
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def searched(self) -> dict[str, list[Entry]]:
        """Group of entries that share a recipe → those it is searched with."""
        if not self.search:
            return {}
        per = self.search["per"]
        if per == "design":
            return {entry.label: [entry] for entry in self.entries}
        families: dict[str, list[Entry]] = {}
        for entry in self.entries:
            families.setdefault(entry.family, [entry])
        return families if per == "family" else {"shared": [entry for first in families.values() for entry in first]}

    def group(self, entry: Entry) -> str:
        return {"design": entry.label, "family": entry.family, "shared": "shared"}[self.search["per"]]

    def search_runs(self) -> list[Run]:
        """The runs of the search, each once."""
        entries = [entry for members in self.searched().values() for entry in members]
        runs = [self.search_run(entry, candidate) for entry in entries for candidate in self.candidates]
        return list({run.folder: run for run in runs}.values())

    def search_run(self, entry: Entry, candidate: Mapping[str, Any]) -> Run:
        """A short run with the first seed, scored on the development split."""
        recipe = fitting(candidate, entry)
        train = _with(entry.train, recipe)
        if self.search.get("max_steps"):
            train["max_steps"] = self.search["max_steps"]
        name = " ".join(f"{key}={value}" for key, value in recipe.items())
        return self._run(entry, "search", self.seeds[0], train, f"search/{slug(entry.label)}/{slug(name)}")

    def runs(self, recipes: Mapping[str, Mapping[str, Any]] | None = None) -> list[Run]:
        """The runs that are compared. recipes: what the search chose, by group."""
        runs = []
        for seed in self.seeds:
            for entry in self.entries:
                recipe = fitting(recipes[self.group(entry)], entry) if recipes else {}
                folder = f"runs/{slug(entry.label)}"
                if self.untrained and seed == self.seeds[0]:
                    runs.append(self._run(entry, "untrained", seed, entry.train, f"{folder}/untrained"))
                runs.append(self._run(entry, "seed", seed, _with(entry.train, recipe), f"{folder}/seed-{seed}"))
        return runs

    def _run(self, entry: Entry, kind: str, seed: int, train: dict[str, Any], folder: str) -> Run:
        label = UNTRAINED.format(entry.label) if kind == "untrained" else entry.label
        tasks, split = self.tasks, self.split
        if kind == "search":
            tasks, split = self.search["tasks"], self.search["split"]
        return Run(label, kind, seed, train, tasks, split, self.data_dir, self.bf16, self.inputs, Path(folder))


def read_study(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), made_data: bool = False, **given: Any
) -> Study:
    """Read and check a config.

    Args:
        source: a YAML file or its content. overrides: "train.max_steps=50", values as in YAML.
        made_data: write a small data set into the output and use it instead of the config's.
        given: keys that replace the config's where they are not None: base, data_dir, output.

    Raises:
        FileNotFoundError: no such config or data. ValueError: unknown or missing keys, labels that repeat, designs that
            are none, a search on the test split, and what `mlpool train` refuses in a config.
    """
    values = read_config(source, [f"--{override}" for override in overrides], SHORT)
    values = check(_KEYS, {**values, **{k: str(v) for k, v in given.items() if v is not None}})
    if missing := [name for name in ("base", "data", "designs", "output") if not values.get(name)]:
        flags = {"base": "--base", "output": "--output"}
        raise ValueError(
            "the study's config lacks " + ", ".join(f"{n} ({flags[n]})" if n in flags else n for n in missing)
        )
    if made_data:
        values.update(use_made_data(values))
    evaluate, data_dir = dict(values.get("evaluate") or {}), values.get("data_dir")
    if not data_dir:
        raise ValueError("the study's config lacks data_dir (--data): the folder with the data to evaluate on")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"there is no folder {data_dir} (data_dir, --data)")
    _check_base(values["base"])
    data = values["data"] if isinstance(values["data"], Mapping) else {"train": values["data"]}
    data = {**data, "train": _find(data.get("train"), Path(data_dir))}
    common = {**DEFAULTS, "model": values["base"], "data": data, **(values.get("train") or {})}
    if "save_steps" in common and common["save_strategy"] == "no":
        common |= {"save_strategy": "steps", "save_total_limit": common.get("save_total_limit", 2)}
    entries = [_entry(given, common) for given in values["designs"]]
    _check_labels(entries)
    seeds = values.get("seeds") or [0]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds repeat: {seeds}")
    baseline = values.get("baseline") or entries[0].label
    _known_label("baseline", baseline, entries)
    options: dict[str, Any] = {
        name: values[name] for name in ("title", "match_parameters", "untrained", "keep_models") if name in values
    }
    return Study(
        base=values["base"], data_dir=str(data_dir), output=Path(values["output"]), entries=entries, seeds=seeds,
        tasks=evaluate.get("tasks"), split=evaluate.get("split", "test"), baseline=baseline,
        bf16=evaluate.get("bf16", False),
        search=_search(values.get("search")), source=values, inputs=_inputs(values["base"], data["train"]), **options,
    )  # fmt: skip


def use_made_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that name data, for data made into OUTPUT/made-data."""
    from .made import LAST, TASKS, TRAIN, write_data

    folder = Path(values["output"]) / "made-data"
    if not (folder / LAST).is_file():  # or a kill left it half
        write_data(folder)
    keys: dict[str, Any] = {"data_dir": str(folder), "data": {"train": TRAIN}}
    keys["evaluate"] = {**(values.get("evaluate") or {}), "tasks": TASKS}
    if values.get("search"):
        keys["search"] = {**values["search"], "tasks": TASKS[:1]}
    return keys


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "-", text).strip("-").lstrip(".")


def changes(before: Any, now: Any, at: str = "") -> list[str]:
    """What differs between two nested configs, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [
            c for name in names for c in changes(before.get(name), now.get(name), f"{at}.{name}" if at else str(name))
        ]
    return [] if before == now else [f"{at} was {before!r}, is {now!r}"]


# --- parts of the config ----------------------------------------------------------------------------------------------


def _check_base(base: str) -> None:
    """A local folder that is not there, or holds no model, is an error before anything starts."""
    check_place(base)
    folder = Path(base)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"the base {base} holds no model: expected config.json, found {there}")


def _entry(given: Any, common: Mapping[str, Any]) -> Entry:
    own: dict[str, Any] = {"name": given} if isinstance(given, str | int) else dict(given)
    design = find_design(own.pop("name", None))
    label, match = str(own.pop("label", design.name)), own.pop("match", None)
    train = {**common, "design": design.name, **own}
    if not design.trainable:
        train.pop("pooler_learning_rate", None)
    if not design.has_latents and "pooler" not in own:
        train.pop("pooler", None)
    train = checked(train)
    read_training({**train, "output_dir": "unused"})
    return Entry(label, design, train, match)


def _check_labels(entries: Sequence[Entry]) -> None:
    labels = [slug(entry.label) for entry in entries]
    if "" in labels:
        raise ValueError(f"{entries[labels.index('')].label!r} is no label; it needs letters or digits")
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"several designs are called {', '.join(repeated)}; give each its own label")
    for entry in entries:
        if entry.match is not None:
            _known_label(f"match of {entry.label}", entry.match, entries)


def _known_label(what: str, label: str, entries: Iterable[Entry]) -> None:
    labels = [entry.label for entry in entries]
    if label not in labels:
        raise ValueError(f"{what}: there is no design labelled {label!r}; {nearest(label, labels)}")


def _search(given: Any) -> dict[str, Any]:
    if not given:
        return {}
    search = {"per": "family", "split": "dev", "tasks": None, **given}
    if search["split"] not in SPLITS or search["split"] == "test":
        raise ValueError("a recipe is chosen on development data: search.split must be dev")
    if "grid" not in search:
        raise ValueError("the study's search lacks grid: keys of the training, each with a list of values")
    search["grid"] = {key: [_value(key, value) for value in values] for key, values in search["grid"].items()}
    return search


def _value(key: str, value: Any) -> Any:
    """A value of a dotted key of the training, as the training has it."""
    values: dict[str, Any] = {}
    put(values, key, value, SHORT)
    values = checked(values)
    for name in key.split("."):
        values = values[name]
    return values


def fitting(recipe: Mapping[str, Any], *entries: Entry) -> dict[str, Any]:
    """A recipe without the pool's keys where none of the entries has a pool to train."""
    pools = any(entry.design.trainable for entry in entries)
    return {key: value for key, value in recipe.items() if pools or not key.startswith("pool")}


def _with(train: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = copied(train)
    for key, value in recipe.items():
        put(result, key, value, SHORT)
    return result


def _find(source: Any, data_dir: Path) -> Any:
    """A training source under `data_dir` where there is one, otherwise as it is."""
    if isinstance(source, list):
        return [_find(part, data_dir) for part in source]
    if isinstance(source, Mapping):
        return {**source, "source": _find(source.get("source"), data_dir)}
    return str(data_dir / source) if isinstance(source, str) and os.path.exists(data_dir / source) else source


def _inputs(base: str, source: Any) -> dict[str, str]:
    """Size and, if not large, content of the files of the base model and the training data, hashed."""
    names: list[Any] = [base]
    waiting = [source]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            waiting.append(part.get("source"))
        else:
            names.append(part)
    return {str(name): _digest(Path(name)) for name in names if isinstance(name, str) and os.path.exists(name)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if size <= _HASHED_WHOLE:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
