"""Training pairs from any common file or table: columns mapped, every row checked, negatives made even.

A pair is an anchor (the query), its positive and 0 or more hard negatives. Rows are read in batches, checked, and
written to an Arrow file that is memory-mapped, so that a set larger than the memory can be trained on.
"""

from __future__ import annotations

import logging
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

try:
    import datasets
    import numpy as np
    import pyarrow as pa
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"training data needs {error.name}: pip install 'mlpool[train]'") from error

from ..pooling.base import check_choice, check_positive
from ..show import aligned, progress
from .columns import BadRow, Columns, count, find_columns, missing_column, plain, shorten, texts_of
from .sources import BATCH, Part, open_source

logger = logging.getLogger("mlpool")
_LISTED = 5  # bad rows shown in an error
_SPEC = ("source", "columns", "split", "limit", "weight")
# The file between checking and the final columns: offsets of 64 bit, as negatives of a batch may exceed 2 GiB.
_STAGED = pa.schema(
    {"anchor": pa.large_string(), "positive": pa.large_string(), "negatives": pa.large_list(pa.large_string())}
)


@dataclass
class Source:
    """One entry of what is loaded, and what became of it.

    Attributes:
        data, wanted, split, limit: as given to `load_pairs`; wanted is its `columns`.
        weight: how often its pairs are in the result; 0.5 is a random half.
        name: what messages call it.
        read, written: rows read, pairs made of them.
        taken, ignored: the columns, in the order found; a set that keeps it.
        dropped, first: rows left out by reason, and the place of the first of each.
        negatives: how many pairs have how many; fewest: the least, and the place of the first row with it.
        same: pairs whose anchor is the positive.
    """

    data: Any
    wanted: Mapping[str, Any] | None
    split: str
    limit: int | None
    weight: float = 1.0
    name: str = ""
    read: int = 0
    written: int = 0
    taken: dict[str, None] = field(default_factory=dict)
    ignored: dict[str, None] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    negatives: Counter[int] = field(default_factory=Counter)
    fewest: tuple[int, str] | None = None
    same: int = 0

    def drop(self, error: BadRow, where: str, listed: list[str]) -> None:
        self.dropped[error.kind] += 1
        self.first.setdefault(error.kind, where)
        if len(listed) < _LISTED:
            listed.append(f"{where}: {error.detail}")

    def add(self, pairs: Sequence[tuple[str, str, list[str]]]) -> None:
        self.written += len(pairs)
        self.negatives.update(len(negatives) for _, _, negatives in pairs)
        self.same += sum(anchor.strip() == positive.strip() for anchor, positive, _ in pairs)

    def note(self, columns: Columns, names: Sequence[str], where: str) -> None:
        """Which of the columns `names` of one file were taken; ValueError for a named one that no row has."""
        for name in columns.negatives or ():
            if name not in names:
                raise missing_column(name, names, where)
        negatives = columns.negatives_of(names, where)
        self.taken[f"{columns}, negative = {' + '.join(negatives)}" if negatives else str(columns)] = None
        used = {columns.anchor, *columns.positives, *negatives}
        self.ignored |= dict.fromkeys(name for name in names if name not in used)

    def __str__(self) -> str:
        text = f"{self.name}: {count(self.written, 'pair')} of {count(self.read, 'row')} ({' or '.join(self.taken)}"
        text += f"; ignored: {', '.join(map(plain, self.ignored))})" if self.ignored else ")"
        if self.weight != 1:
            text += f", × {self.weight:g}"
        if self.dropped:
            reasons = [f"{n:,} {kind} (first {self.first[kind]})" for kind, n in self.dropped.most_common()]
            text += f"; left out {count(self.dropped.total(), 'row')}: {', '.join(reasons)}"
        return text


def load_pairs(
    source: Any,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    num_negatives: int | None = None,
    positives: str = "expand",
    on_error: str = "raise",
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Load, map and check training pairs.

    Args:
        source: one of, or a list of

            - a file: .jsonl, .ndjson, .json, .csv, .tsv (each also .gz; UTF-8, with or without byte-order mark) or
              .parquet. A .json file that is one array is held in memory as text; all else is streamed.
            - a folder of such files, or of `Dataset.save_to_disk`. Where files are named after splits (train.jsonl,
              dev.jsonl), those of `split` are taken.
            - a data set of the Hub, `owner/name` or `owner/name:config`;
            - a datasets.Dataset or DatasetDict, or a list of dicts;
            - a dict {"source": one of these, "weight": 2.0, "limit": …, "columns": …, "split": …}. `weight` is how
              often its pairs are in the result: 2 is twice, 0.5 a random half.
        columns: {"anchor": name, "positive": name or names, "negative": name, names or nothing}; by default found by
            their names (`columns.FORMS`), in each file by itself. A cell holds a text, a list of texts, or one or a
            list of passages {"title", "text"}, joined by a space. A file with labels (`score`) beside plain pairs is
            refused, since some of its rows are no positives.
        split: for folders, DatasetDicts and the Hub ("train[:10%]" works there).
        limit: at most so many pairs of each source, the first ones; reading and checking stop there.
        seed: of every random choice below.
        num_negatives: of every pair. Rows with more give a random choice of theirs, in their order; rows with fewer are
            errors; 0 leaves negatives out. By default the smallest number that any row has: all, where rows agree;
            where they do not, what is left out is counted in a warning; and where only some have none, an error.
        positives: rows with several: "expand" makes a pair of each, "sample" one pair with a random one.
        on_error: "raise": an error naming the first 5 bad rows and how many there are; "skip": they are left out,
            counted in a warning.
        cache_dir: where the Arrow file lies until the process ends; by default in the cache folder of datasets.

    Returns:
        Dataset of strings `anchor`, `positive`, `negative_1` … `negative_n`, source after source in the order read, not
        shuffled. What was mapped is logged (INFO), what was left out too (WARNING); all of it stands in
        `dataset.info.description`. Train with `BatchSamplers.NO_DUPLICATES`: pairs of one anchor in a batch would be
        each other's false negatives.

    Raises:
        ValueError: bad rows (broken line, missing field, no text, empty or blank text, a positive among the negatives,
            too few negatives), each with `file:line` (text, from 1; a CSV row by its first line) or `file[row]`
            (tables, from 0); columns that fit nothing; no row; a damaged file; another extension.
        FileNotFoundError: no such file, folder with data or Hub data set, with the nearest names.
    """
    check_choice("positives", positives, ("expand", "sample"))
    check_choice("on_error", on_error, ("raise", "skip"))
    if num_negatives != 0 and num_negatives is not None:
        check_positive(num_negatives=num_negatives)
    sources = _sources(source, columns, split, limit)
    parts = [open_source(s.data, s.split) for s in sources]
    bad: list[str] = []
    with tempfile.TemporaryDirectory(dir=_folder(cache_dir), prefix="checking-") as folder:
        staged = Path(folder) / "checked.arrow"
        sizes = [None if s.limit else p.size for s, some in zip(sources, parts, strict=True) for p in some]
        with (
            pa.OSFile(str(staged), "wb") as file,
            pa.ipc.new_stream(file, _STAGED) as writer,
            _progress("checking pairs", "rows", None if None in sizes else sum(n or 0 for n in sizes)) as bar,
        ):
            checker = _Checker(random.Random(seed), num_negatives, positives == "sample", bad)
            for s, some in zip(sources, parts, strict=True):
                s.name = some[0].name if len(some) == 1 else f"{s.data} ({len(some)} files)"
                for batch in checker.check(s, some, bar):
                    writer.write_batch(batch)
        _refuse(sources, bad, on_error)
        number, notes = _even(sources, num_negatives)
        result = _write(
            staged, sum(s.written for s in sources), number, np.random.default_rng(seed), _folder(cache_dir)
        )
    if any(s.weight != 1 for s in sources):
        result = result.select(_weighted(sources, seed))
    if same := sum(s.same for s in sources):
        notes.append(f"{count(same, 'pair')} with one text as anchor and positive")
    summary = f"{count(len(result), 'pair')} with {count(number, 'negative')}"
    result.info.description = "\n".join([summary, *map(str, sources), *notes])
    for line in (summary, *(str(s) for s in sources if not s.dropped)):
        logger.info(line)
    for line in (*(str(s) for s in sources if s.dropped), *notes):
        logger.warning(line)
    return result


def describe(dataset: datasets.Dataset, tokenizer: Any = None, max_length: int | None = None) -> str:
    """A table of the columns: rows, duplicates, and words (mean, 95 %, most).

    Args:
        dataset: of `load_pairs`.
        tokenizer: of the embedder; then also tokens, prompts not counted.
        max_length: tokens the embedder keeps; then also how many texts are truncated.

    Duplicates are rows whose text stood in the column before: of anchors, that many pairs cannot share a batch with
    another one without being its false negative.
    """
    words = ["mean", "95 %", "most"]
    head = ["column", "rows", "duplicates", *(f"words {w}" for w in words)]
    if tokenizer is not None:
        head += [f"tokens {w}" for w in words] + (["truncated"] if max_length else [])
    table = [head]
    with _progress("describing", "texts", dataset.num_columns * len(dataset)) as bar:
        for name in dataset.column_names:
            hashes, lengths, tokens = array("q"), array("q"), array("q")  # 8 bytes a text, whatever its length
            for batch in dataset.select_columns(name).with_format(None).iter(BATCH):
                texts = batch[name]
                hashes.extend(map(hash, texts))
                lengths.extend(len(t.split()) for t in texts)
                if tokenizer is not None:
                    tokens.extend(map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"]))
                bar.update(len(texts))
            repeated = len(hashes) - len(np.unique(hashes))
            row = [name, f"{len(hashes):,}", f"{repeated:,}", *_spread(lengths)]
            if tokenizer is not None:
                row += _spread(tokens)
                row += [f"{sum(n > max_length for n in tokens):,}"] if max_length else []
            table.append(row)
    return aligned(table[0], table[1:])


def _progress(what: str, unit: str, total: int | None) -> tqdm:
    """A bar on stderr, once the work has taken a second."""
    return progress(what, unit, total, unit_scale=True, delay=1, leave=False)


def _spread(lengths: Sequence[int]) -> list[str]:
    if not lengths:
        return ["–"] * 3
    return [f"{np.mean(lengths):.1f}", f"{np.percentile(lengths, 95):.0f}", f"{max(lengths):,}"]


# --- what to load --------------------------------------------------------------------------------------------------


def _sources(source: Any, columns: Any, split: str, limit: int | None) -> list[Source]:
    """Every source with its options; `columns`, `split` and `limit` are for those that have none of their own."""
    entries = [source]
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("the list of sources or rows is empty")
        # A list that starts with a dict is rows, unless that dict names a source.
        if not isinstance(source[0], dict) or isinstance(source[0], datasets.DatasetDict) or _is_spec(source[0]):
            entries = list(source)
    result = []
    for entry in entries:
        spec = {"columns": columns, "split": split, "limit": limit, "weight": 1.0}
        if isinstance(entry, dict) and not isinstance(entry, datasets.DatasetDict):
            if not _is_spec(entry):
                raise ValueError(f"a source given as dict has 'source' and may have {_SPEC[1:]}, got {shorten(entry)}")
            spec |= entry
        else:
            spec["source"] = entry
        weight, most = spec["weight"], spec["limit"]
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"weight must be a number above 0, got {weight!r}")
        if most is not None:
            check_positive(limit=most)
        result.append(Source(spec["source"], spec["columns"], spec["split"], most, float(weight)))
    return result


def _is_spec(entry: Any) -> bool:
    return isinstance(entry, dict) and "source" in entry and set(entry) <= set(_SPEC)


@lru_cache
def _scratch(parent: str) -> tempfile.TemporaryDirectory:
    """A folder that is removed when the process ends."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent, prefix="mlpool-", ignore_cleanup_errors=True)


def _folder(cache_dir: str | Path | None) -> str:
    return _scratch(str(cache_dir or datasets.config.HF_DATASETS_CACHE)).name


# --- checking ------------------------------------------------------------------------------------------------------

_Pairs = list[tuple[str, str, list[str]]]  # anchor, positive, negatives


@dataclass
class _Checker:
    """Turns rows into record batches of `_STAGED`; bad rows go into the source's counts, the first also into `bad`."""

    random: random.Random
    num_negatives: int | None
    sample: bool
    bad: list[str]

    def check(self, source: Source, parts: Sequence[Part], bar: tqdm) -> Iterator[pa.RecordBatch]:
        for part in parts:
            before = source.read
            yield from self._part(source, part, bar)
            if source.read == before:
                raise ValueError(f"{part.name} is empty: it has no rows")
            if source.written == source.limit:
                return

    def _part(self, source: Source, part: Part, bar: tqdm) -> Iterator[pa.RecordBatch]:
        """The pairs of one file. Its columns are those known beforehand, else those of its first batch with a row."""
        columns = None if part.columns is None else self._find(part.columns, part, source)
        wanted = None
        if columns is not None and part.columns is not None:
            found = [columns.anchor, *columns.positives, *columns.negatives_of(part.columns, part.name)]
            wanted = list(dict.fromkeys(found))
        rows = part.read(wanted)
        negatives: dict[tuple, list[str]] = {}  # by the row's fields; from row to row more may come
        while batch := list(islice(rows, BATCH)):
            if columns is None:
                names = list(dict.fromkeys(name for _, row in batch if isinstance(row, dict) for name in row))
                columns = self._find(names, part, source) if names else None
            pairs: _Pairs = []
            for number, row in batch:
                source.read += 1
                try:
                    new = self._row(row, columns, negatives, part.name)
                except BadRow as error:
                    source.drop(error, part.at(number), self.bad)
                    continue
                if source.fewest is None or len(new[0][2]) < source.fewest[0]:
                    source.fewest = len(new[0][2]), part.at(number)
                pairs += new
                if source.limit is not None and source.written + len(pairs) >= source.limit:
                    del pairs[source.limit - source.written :]
                    break
            bar.update(len(batch))
            if pairs:
                source.add(pairs)
                sides = zip(*pairs, strict=True)
                arrays = [pa.array(list(side), type) for side, type in zip(sides, _STAGED.types, strict=True)]
                yield pa.record_batch(arrays, schema=_STAGED)
            if source.written == source.limit:
                break
        if columns is not None:
            source.note(
                columns, part.columns or list(dict.fromkeys(n for names in negatives for n in names)), part.name
            )

    def _find(self, names: Sequence[str], part: Part, source: Source) -> Columns:
        columns = find_columns(names, part.name, source.wanted)
        return columns._replace(negatives=()) if self.num_negatives == 0 else columns

    def _row(self, row: Any, columns: Columns | None, negatives_of: dict[tuple, list[str]], where: str) -> _Pairs:
        """The pairs of one row, at least one, or BadRow."""
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict) or columns is None:
            raise BadRow("no fields", f"the row is {type(row).__name__} {shorten(row)}, expected fields with names")
        names = tuple(row)
        if names not in negatives_of:
            negatives_of[names] = columns.negatives_of(names, where)
        for name in (columns.anchor, *columns.positives):
            if name not in row:
                raise BadRow("missing field", f"no field {name!r}, only {', '.join(map(repr, names)) or 'none'}")
        anchors = texts_of(row[columns.anchor], columns.anchor)
        if len(anchors) != 1:
            raise BadRow("not one anchor", f"{columns.anchor} holds {len(anchors)} texts, expected one")
        positives = [text for name in columns.positives for text in texts_of(row[name], name)]
        if not positives:
            raise BadRow("no positive", f"{' and '.join(columns.positives)}: an empty list")
        # A row may have fewer negatives than others: a field that is missing or null is none.
        negatives = [t for name in negatives_of[names] if (cell := row[name]) is not None for t in texts_of(cell, name)]
        if negatives:
            stripped = {text.strip() for text in positives}
            for i, text in enumerate(negatives):
                if text.strip() in stripped:
                    raise BadRow("positive among negatives", f"negative {i + 1} is the positive: {shorten(text)}")
        if self.num_negatives is not None and len(negatives) < self.num_negatives:
            detail = f"{count(len(negatives), 'negative')}, but num_negatives={self.num_negatives}"
            raise BadRow("too few negatives", detail)
        if self.sample and len(positives) > 1:
            positives = [self.random.choice(positives)]
        return [(anchors[0], positive, negatives) for positive in positives]


def _refuse(sources: Sequence[Source], bad: Sequence[str], on_error: str) -> None:
    """ValueError if there are bad rows that may not be left out, or nothing but bad rows."""
    dropped, read = sum(s.dropped.total() for s in sources), sum(s.read for s in sources)
    empty = next((s.name for s in sources if not s.written), None)
    if not dropped or (on_error == "skip" and empty is None):
        return
    shown = "".join(f"\n  {line}" for line in bad) + ("\n  …" if dropped > len(bad) else "")
    if on_error == "skip":
        raise ValueError(f"{empty}: no row is left, {dropped:,} of {read:,} cannot be used:{shown}")
    raise ValueError(f"{dropped:,} of {read:,} rows cannot be used; on_error='skip' leaves them out:{shown}")


# --- the final columns ---------------------------------------------------------------------------------------------


def _even(sources: Sequence[Source], num_negatives: int | None) -> tuple[int, list[str]]:
    """How many negatives each pair shall have, and what there is to say about it."""
    counts = sum((s.negatives for s in sources), Counter())
    least, most = min(counts), max(counts)
    if num_negatives is None and least == 0 < most:
        where = next(s.fewest[1] for s in sources if s.fewest and s.fewest[0] == 0)
        raise ValueError(
            f"{counts[0]:,} of {counts.total():,} pairs have no negatives (first {where}), others up to {most}; pass "
            f"num_negatives=0 to train without negatives, or num_negatives=1 (to {most}) with on_error='skip' to leave "
            "those rows out"
        )
    number = least if num_negatives is None else num_negatives
    have = sum(n * pairs for n, pairs in counts.items())
    left = have - number * counts.total()
    if not left:
        return number, []
    more = "" if number == most else f"; num_negatives={number + 1} to {most} keeps more, of the rows that have as many"
    return number, [
        f"{left:,} of {have:,} negatives left out: pairs have {least} to {most}, {number} kept of each{more}"
    ]


def _write(staged: Path, total: int, number: int, generator: np.random.Generator, folder: str) -> datasets.Dataset:
    """The checked pairs with `number` columns of negatives, as a memory-mapped Dataset."""
    names = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(number))]
    schema = pa.schema(dict.fromkeys(names, pa.string()))
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix="pairs-", suffix=".arrow", delete=False) as file,
        pa.ipc.new_stream(file, schema) as writer,
        pa.memory_map(str(staged)) as source,
        _progress("writing pairs", "rows", total) as bar,
    ):
        for batch in pa.ipc.open_stream(source):
            negatives = batch["negatives"]
            chosen = _choose(negatives.value_lengths().to_numpy(), number, generator)
            texts = [*batch.columns[:2], *(negatives.flatten().take(pa.array(c)) for c in chosen.T)]
            writer.write_batch(pa.record_batch([t.cast(pa.string()) for t in texts], schema=schema))
            bar.update(len(batch))
    return datasets.Dataset.from_file(file.name)


def _choose(lengths: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """For lists of `lengths` [rows], laid end to end, the places of `number` random elements of each, in order."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    shuffled = np.lexsort((generator.random(len(row)), row))  # within each row
    starts = np.cumsum(lengths) - lengths
    return np.sort(shuffled[starts[:, None] + np.arange(number)], axis=1)


def _weighted(sources: Sequence[Source], seed: int) -> np.ndarray:
    """The rows of each source as often as its weight says: all of them whole times, then a random part in order."""
    generator = np.random.default_rng(seed)
    rows, start = [], 0
    for s in sources:
        times, rest = divmod(max(1, round(s.weight * s.written)), s.written)
        part = np.sort(generator.choice(s.written, rest, replace=False))
        rows += [start + np.tile(np.arange(s.written), times), start + part]
        start += s.written
    return np.concatenate(rows)
