"""Hard negatives of many pairs: `sentence_transformers.util.mine_hard_negatives`, in bounded memory and resumable.

That function holds all texts, all embeddings and the best of every anchor at once, knows its cache of embeddings by a
base model's name alone, and cannot go on where it was. So it is called on small parts, as its own model: the embeddings
are those of `encode_files`, and the corpus of a part is what an exact search over all documents found for its anchors.
Since that holds the best of each anchor, the part's negatives are those of a call on everything. Texts go by their
numbers; a duplicate (`text_store.text_key`) is its original, and an anchor is a positive of its own, so that neither
its positives anywhere in the pairs nor a copy of them or of itself is ever its negative.
"""

import contextlib
import functools
import io
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..files import replacing
from ..pooling.base import check_choice, check_positive
from ..show import progress
from .neighbours import Found, nearest
from .text_store import Embeddings, TextStore

BLOCK = 8192  # anchors searched for at once: most that is lost in a kill
PART = 256  # anchors given to the miner at once
_HELD = 2**24  # nearest documents held at once: 192 MiB
SAMPLING = ("top", "random")


@dataclass(frozen=True)
class Choice:
    """Which of an anchor's nearest documents become its negatives; see `mine_hard_negatives`.

    Attributes:
        num_negatives: of every anchor. range_min: so many of the nearest that may be negatives are passed over.
        range_max: the nearest beyond so many, positives not counted, are not looked at; None: ten times
            num_negatives after range_min.
        max_score, min_score: bounds of a negative's score. absolute_margin: below the positive's score by so much at
            least; relative_margin: by this share of it. Of several positives the lowest score counts.
        sampling: "top", the nearest of those left, or "random". seed: of "random".
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling: str = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(num_negatives=self.num_negatives)
        check_choice("sampling", self.sampling, SAMPLING)
        if self.range_min < 0:
            raise ValueError(f"range_min must be 0 or more, got {self.range_min}")
        if self.last - self.range_min < self.num_negatives:
            raise ValueError(
                f"range_min={self.range_min} to range_max={self.range_max} leaves {max(0, self.last - self.range_min)} "
                f"documents for {self.num_negatives} negatives; raise range_max"
            )

    @property
    def last(self) -> int:
        """`range_max`, as a number."""
        return self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max

    @property
    def judges(self) -> bool:
        """Whether scores decide, and not ranks alone."""
        return any(v is not None for v in (self.max_score, self.min_score, self.absolute_margin, self.relative_margin))

    def as_options(self) -> dict[str, Any]:
        """Of `mine_hard_negatives`."""
        options = {**asdict(self), "range_max": self.last, "sampling_strategy": self.sampling}
        return {name: value for name, value in options.items() if name not in ("sampling", "seed")}


class Pairs(NamedTuple):
    """Which document is a positive of which anchor, by their numbers: each once, by anchor.

    anchors, documents: int64 [P].
    """

    anchors: np.ndarray
    documents: np.ndarray

    @classmethod
    def of(cls, anchors: np.ndarray, documents: np.ndarray, copies: np.ndarray) -> tuple[Self, np.ndarray]:
        """The pairs of a table, and where each of its rows is among them.

        Args:
            anchors, documents: int64 [N]. copies: int64 [anchors], the document that an anchor itself is, or -1; it
                counts as a positive, whose score is as high as can be.
        """
        same, many = np.flatnonzero(copies >= 0), max(documents.max(), copies.max()) + 1
        keys = np.concatenate([anchors * many + documents, same * many + copies[same]])
        unique, inverse = np.unique(keys, return_inverse=True)
        return cls(unique // many, unique % many), inverse[: len(anchors)]


class Mined(NamedTuple):
    """What was found for a block of anchors.

    documents: int64 [N, k], nearest first, -1 behind the last; scores: float32 [N, k], NaN there. positives: float32
    [P], the score of each of the block's `Pairs`, NaN for those of anchors without a negative.
    """

    documents: np.ndarray
    scores: np.ndarray
    positives: np.ndarray


def mine(
    pairs: Pairs, anchors: TextStore, documents: TextStore, choice: Choice, folder: Path, *,
    judge: Any = None, batch_size: int = 32, device: str | torch.device = "cpu", search: str = "auto",
) -> None:  # fmt: skip
    """Mine block after block into `folder`; those that are there already are kept. `Blocks` reads them.

    Args:
        judge: a CrossEncoder whose scores decide in place of the embeddings' among the documents that these find.
        batch_size: of its texts. device: where torch searches. search: of `nearest`.
    """
    miner = _Miner(anchors, documents, choice, judge, batch_size, torch.device(device), search)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("mining", "anchors", len(anchors), unit_scale=True) as bar:
        for index, start in enumerate(range(0, len(anchors), BLOCK)):
            if _read(_path(folder, index)) is not None:
                bar.update(min(BLOCK, len(anchors) - start))
                continue
            first, last = np.searchsorted(pairs.anchors, [start, start + BLOCK])
            block = miner.block(start, Pairs(pairs.anchors[first:last], pairs.documents[first:last]), bar)
            with replacing(_path(folder, index)) as new:
                np.savez(new, **block._asdict())


class Blocks:
    """What `mine` wrote, a block in memory at a time or two."""

    def __init__(self, folder: Path, pairs: Pairs) -> None:
        self._folder, self._pairs = folder, pairs
        self._block = functools.lru_cache(2)(self._load)

    def _load(self, index: int) -> tuple[Mined, int]:
        mined = _read(_path(self._folder, index))
        if mined is None:
            raise ValueError(f"{_path(self._folder, index)} is missing or damaged; run the same command again")
        return mined, int(np.searchsorted(self._pairs.anchors, index * BLOCK))

    def of(self, anchor: int, pair: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The documents of an anchor and their scores, those that were found, and the score of its pair."""
        mined, first = self._block(anchor // BLOCK)
        found = mined.documents[anchor % BLOCK] >= 0
        return (
            mined.documents[anchor % BLOCK][found], mined.scores[anchor % BLOCK][found],
            float(mined.positives[pair - first]),
        )  # fmt: skip


def _path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.npz"


def _read(path: Path) -> Mined | None:
    """None where there is none, or a broken one, which is made again."""
    damage = (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*damage), np.load(path, allow_pickle=False) as file:
        return Mined(*(file[name] for name in Mined._fields))
    return None


class _Miner:
    """The search, and the choice among what it finds, of one block of anchors at a time."""

    def __init__(
        self, anchors: TextStore, documents: TextStore, choice: Choice, judge: Any, batch_size: int,
        device: torch.device, search: str,
    ) -> None:  # fmt: skip
        self.queries, self.documents, self.choice = anchors.embeddings(), documents.embeddings(), choice
        self.judge: Any = None if judge is None else _Judge(judge, anchors, documents)
        self.batch_size, self.device, self.search = batch_size, device, search

    def block(self, start: int, pairs: Pairs, bar: Any) -> Mined:
        """Of the anchors from `start` on that `pairs` has, which is every one."""
        local, k = pairs.anchors - start, self.choice.num_negatives
        counts = np.bincount(local)
        mined = Mined(
            np.full((len(counts), k), -1, np.int64), np.full((len(counts), k), np.nan, np.float32),
            np.full(len(local), np.nan, np.float32),
        )  # fmt: skip
        # The miner looks at as many more documents for all as one anchor of a call has positives: by how many these
        # are, an anchor's negatives do not depend on which others it is called with.
        order = np.argsort(counts, kind="stable")
        while len(order):
            depths = np.arange(1, len(order) + 1) * (self.choice.last + counts[order])
            together = order[: max(1, int(np.searchsorted(depths, _HELD)))]
            order = order[len(together) :]
            depth = self.choice.last + counts[together[-1]]
            scores, rows = nearest(
                self.queries.take(together + start), self.documents, int(depth), self.device, self.search
            )
            for at in _parts(counts[together]):
                own = self.choice.last + counts[together[at[0]]]
                self._part(together[at], (scores[at, :own], rows[at, :own]), start, pairs, mined)
                bar.update(len(at))
        return mined

    def _part(self, local: np.ndarray, found: Found, start: int, pairs: Pairs, mined: Mined) -> None:
        from datasets import Dataset
        from sentence_transformers.util import mine_hard_negatives

        places = np.flatnonzero(np.isin(pairs.anchors, local + start))
        names = {"anchor": pairs.anchors[places], "positive": pairs.documents[places]}
        corpus = np.unique(found[1][found[1] >= 0])
        state = random.getstate()
        random.seed(f"{self.choice.seed} {local[0] + start}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar for every call
                rows = mine_hard_negatives(
                    Dataset.from_dict({side: list(map(str, numbers)) for side, numbers in names.items()}),
                    _Known(self.queries, self.documents),  # type: ignore[arg-type]
                    corpus=list(map(str, corpus)), cross_encoder=self.judge, batch_size=self.batch_size,
                    output_format="labeled-list", output_scores=True, verbose=False, **self.choice.as_options(),
                )  # fmt: skip
        finally:
            random.setstate(state)
        place = {pair: i for i, pair in zip(places, zip(*names.values(), strict=True), strict=True)}
        for row in rows:
            anchor, (positive, *negatives) = int(row["anchor"]), map(int, row["positive"])
            score, *scores = row["scores"]
            mined.positives[place[anchor, positive]] = score
            mined.documents[anchor - start, : len(negatives)] = negatives
            mined.scores[anchor - start, : len(scores)] = scores


def _parts(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Places of `counts`, which rise, in parts of one count and `PART` at most."""
    for of_one in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(counts)) + 1):
        yield from np.split(of_one, range(PART, len(of_one), PART))


class _Known:
    """What `mine_hard_negatives` asks of a model, answered from embeddings at unit length; a text is its number."""

    device = torch.device("cpu")

    def __init__(self, queries: Embeddings, documents: Embeddings) -> None:
        self._queries, self._documents = queries, documents

    def encode_query(self, names: Sequence[str], **_: Any) -> np.ndarray:
        return self._queries.take(np.array(names, np.int64))

    def encode_document(self, names: Sequence[str], **_: Any) -> np.ndarray:
        return self._documents.take(np.array(names, np.int64))

    @staticmethod
    def similarity(a: Any, b: Any) -> torch.Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    @staticmethod
    def similarity_pairwise(a: Any, b: Any) -> torch.Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


class _Judge:
    """A CrossEncoder that is given numbers and reads the texts."""

    def __init__(self, model: Any, anchors: TextStore, documents: TextStore) -> None:
        self._model, self._anchors, self._documents = model, anchors, documents

    def predict(self, pairs: Sequence[tuple[str, str]], batch_size: int, **_: Any) -> torch.Tensor:
        texts = [(self._anchors[int(a)], self._documents[int(d)]) for a, d in pairs]
        scores = self._model.predict(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        scores = scores.float().cpu()
        if scores.ndim != 1:
            raise ValueError(f"the cross-encoder gives {list(scores.shape[1:])} numbers a pair, expected one score")
        if not scores.isfinite().all():
            worst = texts[int((~scores.isfinite()).int().argmax())]
            raise ValueError(f"the cross-encoder's score of {worst[0]!r:.60} with {worst[1]!r:.60} is not finite")
        return scores
