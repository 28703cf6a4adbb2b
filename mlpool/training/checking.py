"""Rows of a source become checked pairs: which columns were taken, what was left out and why, each row by its place."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from ..corpus.rows import BATCH, BadRow
from ..corpus.sources import Part
from ..show import plain, shorten
from .columns import Columns, count, find_columns, missing_column, texts_of

_LISTED = 5  # bad rows shown in an error
# The file between checking and the final columns: offsets of 64 bit, as negatives of a batch may exceed 2 GiB.
STAGED = pa.schema(
    {
        "anchor": pa.large_string(),
        "positive": pa.large_string(),
        "negatives": pa.large_list(pa.large_string()),
        "scores": pa.large_list(pa.float32()),  # empty where no column of them was asked for
    }
)
_Pairs = list[tuple[str, str, list[str], list[float]]]  # anchor, positive, negatives, scores of positive and these


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

    def add(self, pairs: _Pairs) -> None:
        self.written += len(pairs)
        self.negatives.update(len(negatives) for _, _, negatives, _ in pairs)
        self.same += sum(anchor.strip() == positive.strip() for anchor, positive, *_ in pairs)

    def note(self, columns: Columns, names: Sequence[str], where: str, scores: str | None = None) -> None:
        """Which of the columns `names` of one file were taken; ValueError for a named one that no row has."""
        for name in columns.negatives or ():
            if name not in names:
                raise missing_column(name, names, where)
        negatives = columns.negatives_of(names, where)
        self.taken[f"{columns}, negative = {' + '.join(negatives)}" if negatives else str(columns)] = None
        used = {columns.anchor, *columns.positives, *negatives, scores}
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


@dataclass
class Checker:
    """Turns rows into record batches of `STAGED`; bad rows go into the source's counts, the first also into `bad`."""

    random: random.Random
    num_negatives: int | None
    sample: bool
    bad: list[str]
    scores: str | None = None

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
            found += [self.scores] if self.scores in part.columns else []
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
                arrays = [pa.array(list(side), type) for side, type in zip(sides, STAGED.types, strict=True)]
                yield pa.record_batch(arrays, schema=STAGED)
            if source.written == source.limit:
                break
        if columns is not None:
            source.note(
                columns, part.columns or list(dict.fromkeys(n for names in negatives for n in names)), part.name,
                self.scores,
            )  # fmt: skip

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
        scores = [] if self.scores is None else _scores(row, self.scores, len(positives), len(negatives))
        return [(anchors[0], positive, negatives, scores) for positive in positives]


def _scores(row: Mapping[str, Any], name: str, positives: int, negatives: int) -> list[float]:
    """A teacher's scores in a row: of its positive, then of its negatives in their order; or BadRow."""
    values = row.get(name)
    if values is None:
        raise BadRow("no scores", f"no field {name!r}, which has the teacher's scores")
    if positives != 1 or not negatives:
        have = f"{count(positives, 'positive')} and {count(negatives, 'negative')}"
        raise BadRow("no candidates", f"{name} needs one positive and a negative or more to score, got {have}")
    good = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not good:
        raise BadRow("no scores", f"{name} is {shorten(values)}, expected a list of finite numbers")
    if len(values) != 1 + negatives:
        expected = f"{1 + negatives}: the positive's and one of each of {count(negatives, 'negative')}"
        raise BadRow("wrong number of scores", f"{name} holds {count(len(values), 'number')}, expected {expected}")
    return [float(v) for v in values]


def refuse(sources: Sequence[Source], bad: Sequence[str], on_error: str) -> None:
    """ValueError if there are bad rows that may not be left out, or nothing but bad rows."""
    dropped, read = sum(s.dropped.total() for s in sources), sum(s.read for s in sources)
    empty = next((s.name for s in sources if not s.written), None)
    if not dropped or (on_error == "skip" and empty is None):
        return
    shown = "".join(f"\n  {line}" for line in bad) + ("\n  …" if dropped > len(bad) else "")
    if on_error == "skip":
        raise ValueError(f"{empty}: no row is left, {dropped:,} of {read:,} cannot be used:{shown}")
    raise ValueError(f"{dropped:,} of {read:,} rows cannot be used; on_error='skip' leaves them out:{shown}")
