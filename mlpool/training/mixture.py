"""The pairs of a training, of one source or of several, each with its own columns, prompts and weight."""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from pydantic import BeforeValidator, Field

from .. import schema
from ..show import aligned
from .columns import SOURCE_NAME, column_prompts, count, find_columns, text_columns
from .data import describe, load_pairs, repeated
from .sampling import OneSourceBatchSampler, passes, too_few
from .steps import Steps, asked_steps, count_steps, filled_batches

logger = logging.getLogger("mlpool")

ONE_SOURCE = "one source"
Batches = Literal["mixed", "one source"]


def _temperature(value: Any) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if not number > 0:
        raise ValueError("a number above 0 (.inf: sources are drawn by their weights alone)")
    return number


Temperature = Annotated[Any, BeforeValidator(_temperature)]
# Keys of `data` that are not options of `load_pairs`.
OURS = ("train", "eval", "temperature", "batches")


@dataclass
class TrainingSource:
    """One entry of the config's data: its pairs, and how they are used.

    Attributes:
        name: "" where it is the only one and has none. prompts: "query" and "document", in place of the embedder's.
    """

    name: str
    pairs: datasets.Dataset
    weight: float = 1.0
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return text_columns(self.pairs)

    def column_prompts(self, stored: Mapping[str, str | None]) -> dict[str, str]:
        """See `columns.column_prompts`; its own come before the embedder's."""
        return column_prompts({**stored, **self.prompts}, self.columns)


@dataclass
class Mixture:
    """The sources of a training, or of its evaluation, and how batches are made of them.

    Attributes:
        temperature: T of `sampling.passes`. batches: "mixed" or "one source". seed: of the random part of a source
            that an epoch does not wholly take.
    """

    sources: list[TrainingSource]
    temperature: float = 1.0
    batches: Batches = "mixed"
    seed: int = 0

    @property
    def several(self) -> bool:
        """Whether they were named one by one; a list of one is several, too."""
        return self.sources[0].name != ""

    @property
    def passes(self) -> list[float]:
        """How often an epoch goes through each source."""
        return passes([len(s.pairs) for s in self.sources], [s.weight for s in self.sources], self.temperature)

    @property
    def size(self) -> float:
        """Pairs of an epoch."""
        return sum(often * len(s.pairs) for often, s in zip(self.passes, self.sources, strict=True))

    def dataset(self) -> datasets.Dataset | datasets.DatasetDict:
        """As the trainer takes it: by source where batches are of one, else one set, each pair as often as it is due.

        Raises:
            ValueError: batches are mixed and columns differ.
        """
        if not self.several:
            return self.sources[0].pairs
        if self.batches == ONE_SOURCE:
            return datasets.DatasetDict({s.name: s.pairs for s in self.sources})
        self._check_columns()
        pairs = [s.pairs for s in self.sources]
        if any(s.prompts for s in self.sources):  # then a row must tell whose it is
            pairs = [s.pairs.add_column(SOURCE_NAME, [s.name] * len(s.pairs)) for s in self.sources]
        joined = datasets.concatenate_datasets(pairs)
        if any(often != 1 for often in self.passes):
            joined = joined.select(repeated([len(part) for part in pairs], self.passes, self.seed))
        return joined

    def _check_columns(self) -> None:
        first = self.sources[0]
        for other in self.sources[1:]:
            if other.pairs.column_names != first.pairs.column_names:
                raise ValueError(
                    f"the sources {first.name!r} ({', '.join(first.pairs.column_names)}) and {other.name!r} "
                    f"({', '.join(other.pairs.column_names)}) have different columns, and a batch that mixes them "
                    "needs the same; say num_negatives as the poorer one has them, or data.batches: one source"
                )

    def texts(self, most: int, stored: Mapping[str, str | None]) -> list[tuple[str, str]]:
        """About so many texts of an epoch, each with its prompt, from every source and column; the same each time."""
        found: list[tuple[str, str]] = []
        for often, source in zip(self.passes, self.sources, strict=True):
            wanted = math.ceil(most * often * len(source.pairs) / self.size / len(source.columns))
            rows = random.Random(self.seed).sample(range(len(source.pairs)), min(wanted, len(source.pairs)))
            drawn, prompts = source.pairs.select(rows), source.column_prompts(stored)
            found += [(prompts.get(name, ""), text) for name in source.columns for text in drawn[name]]
        return list(dict.fromkeys(found))

    # --- batches of one source --------------------------------------------------------------------------------------

    def draws(self, size: int, processes: int) -> list[int]:
        """Of each source in an epoch; a draw is a batch of `size` for every process.

        Raises:
            ValueError: a source has fewer pairs than a draw.
        """
        for s in self.sources:
            if len(s.pairs) < size * processes:
                raise ValueError(f"{too_few(s.name, size, processes)}. It has {count(len(s.pairs), 'pair')}")
        due = [often * len(s.pairs) for often, s in zip(self.passes, self.sources, strict=True)]
        return [max(1, int(pairs / (size * processes))) for pairs in due]

    def sampler(self, size: int, processes: int) -> Any:
        """What makes the sampler of batches of one source, of what sentence-transformers' trainer gives."""
        names, draws = [s.name for s in self.sources], self.draws(size, processes)
        return partial(OneSourceBatchSampler, names=names, draws=draws, together=processes)

    def count_steps(self, arguments: Any, processes: int) -> Steps:
        """See `steps.count_steps`. Of one source a batch, every epoch has all batches that it promises."""
        pairs = self.dataset()
        if isinstance(pairs, datasets.Dataset):
            return count_steps(pairs, arguments, processes)
        size = arguments.per_device_train_batch_size
        asked = asked_steps(sum(self.draws(size, processes)), arguments)
        for s in self.sources:
            if next(filled_batches(s.pairs, arguments, size, processes, 1)) < processes:
                raise ValueError(too_few(s.name, size, processes))
        return Steps(asked, asked)

    # --- what it is -------------------------------------------------------------------------------------------------

    def describe(self, lengths: Callable[[str, str, Sequence[str]], list[int]], max_length: int | None) -> str:
        """Tables of the sources and of their columns; lengths: source, column, texts → the tokens of each."""
        told = logger.isEnabledFor(logging.INFO)  # by `load_pairs`, what was read and left out
        parts = [
            ("" if told else f"{s.pairs.info.description or ''}\n")
            + describe(s.pairs, partial(lengths, s.name), max_length)
            for s in self.sources
        ]
        if self.several:
            due = [often * len(s.pairs) for often, s in zip(self.passes, self.sources, strict=True)]
            rows = [
                [s.name, f"{len(s.pairs):,}", f"{s.weight:g}", f"{pairs / sum(due):.1%}", f"{pairs / len(s.pairs):.2f}"]
                for s, pairs in zip(self.sources, due, strict=True)
            ]
            head = [f"source (batches: {self.batches})", "pairs", "weight", "share", "times an epoch"]
            parts.append(aligned(head, rows))
        return "\n".join(parts)


# --- from a config ----------------------------------------------------------------------------------------------------


def load_mixture(data: Mapping[str, Any], which: Literal["train", "eval"] = "train") -> Mixture:
    """The pairs of a config's `data`, loaded and checked; errors as of `load_pairs` and `read_sources`."""
    entries = read_sources(data[which], which)
    # A limit is of what is trained on; an evaluation source may have its own.
    options = {name: v for name, v in data.items() if name not in OURS and not (which == "eval" and name == "limit")}
    mixing = {name: data[name] for name in ("temperature", "batches") if name in data}
    if which == "eval":
        mixing.pop("temperature", None)
    if entries is None:
        return Mixture([TrainingSource("", load_pairs(data[which], **options))])
    sources = []
    for entry in entries:
        own = {name: value for name, value in entry.items() if name not in ("name", "weight", "prompts")}
        prompts = {name: prompt for name, prompt in entry.get("prompts", {}).items() if prompt is not None}
        pairs = load_pairs(**{**options, **own})
        sources.append(TrainingSource(entry["name"], pairs, entry.get("weight", 1.0), prompts))
    return Mixture(sources, **mixing, seed=data.get("seed", 0))


def read_sources(given: Any, which: str = "train") -> list[dict[str, Any]] | None:
    """What a config says of several sources, each with a name; None where it is one thing for `load_pairs`.

    Raises:
        ValueError: an unknown key, a weight of 0 or below, a name twice, …; it says where.
    """
    given = [given] if _is_entry(given) else given
    several = isinstance(given, list | tuple) and given and (isinstance(given[0], str | Path) or _is_entry(given[0]))
    if not several:
        return None
    entries = []
    for i, entry in enumerate(given):
        entry = dict(entry) if isinstance(entry, Mapping) else {"source": entry}
        entry = schema.check(_keys(), entry, f"data.{which}.{i}")
        if isinstance(source := entry.get("source"), bool | int | float | None):
            raise ValueError(
                f"data.{which}.{i} has {source!r} as its source, expected a path or a Hub data set's name, as in "
                "{source: pairs.jsonl, weight: 2}"
            )
        known = isinstance(entry["source"], str | Path)
        entries.append({"name": str(entry["source"]) if known else f"source {i + 1}", **entry})
    for i, entry in enumerate(entries):
        if entry["name"] in [other["name"] for other in entries[:i]]:
            raise ValueError(f"data.{which}.{i}: there is a source {entry['name']!r} before; give it a name of its own")
        if not entry["name"]:
            raise ValueError(f"data.{which}.{i}: the name is empty")
    return entries


def _is_entry(value: Any) -> bool:
    """A source with its options, not a row that happens to have a column `source`."""
    if not isinstance(value, Mapping) or isinstance(value, datasets.DatasetDict) or "source" not in value:
        return False
    try:
        find_columns([str(name) for name in value], "")
    except ValueError:
        return True
    return False


@cache
def _keys() -> Any:
    """What an entry of several sources may hold."""
    taken = schema.arguments(load_pairs)
    prompts = schema.section("key in prompts of a source", dict.fromkeys(("query", "document"), str | None))
    return schema.section(
        "key of a source",
        {
            **{name: taken[name] for name in ("source", "columns", "split", "num_negatives")},
            "limit": Annotated[int, Field(ge=1)] | None,
            "weight": Annotated[float, Field(gt=0)],
            "name": str,
            "prompts": prompts,
        },
    )
