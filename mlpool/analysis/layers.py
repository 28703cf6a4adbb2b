"""How alike a model's layers are, which of them scores best, and which ones its pool reads; defined in command.py."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from ..files import write_csv
from ..show import aligned
from .correlation import Correlations
from .plots import heat_maps
from .profiles import PoolProfile, reader_of
from .scores import LayerScores, Pairs, Scorer
from .states import FEWEST, poolings_of, windows

logger = logging.getLogger("mlpool")

# --- the API ----------------------------------------------------------------------------------------------------------


def analyse(
    model: SentenceTransformer,
    texts: Sequence[str] | None = None,
    pairs: Pairs | Mapping[str, Pairs] | None = None,
    *,
    token_pooling: str = "all",
    **options: Any,
) -> "LayerReport":
    """Look inside a model's layers.

    Args:
        model: any SentenceTransformer whose layers are found; an embedder of `mlpool.load` for the pool's profile.
        texts: for correlations and profile. None: those of the pairs, in the same pass.
        pairs: for the scores; a data set, or several by name.
        token_pooling: "last", "mean", "unit_mean" or "all".
        options: window (texts whose states are in memory at once, and over which a term of the CKA is taken), prompt,
            token_budget, seed, progress; see `mlpool.analysis.states.windows`.

    Raises:
        ValueError: neither texts nor pairs, fewer than 4 of them, gold scores that are all alike or of another number,
            a model whose layers are not found.
    """
    poolings = poolings_of(token_pooling)
    sets = checked(pairs)
    if not sets and not texts:
        raise ValueError("no texts: give texts, pairs or both")
    if texts is not None:
        check_count(len(texts), "texts")
    alike, scorer, notes = Correlations(poolings), Scorer(poolings, sets), []
    reader = reader_of(model)
    if reader is None:
        notes.append("no profile: the model has no pool that reads several layers")
    began, cut = time.perf_counter(), _cut(model)
    with reader or nullcontext():
        if texts is not None:
            _pass(model, [(text,) for text in texts], poolings, [alike], options)
        else:
            _pass(model, scorer.groups, poolings, [alike, scorer], options)
    if texts is not None and sets:
        _pass(model, scorer.groups, poolings, [scorer], options)
    seconds = time.perf_counter() - began
    if (now := _cut(model)) > cut:
        notes.append(f"{now - cut} texts were cut at {model.max_seq_length} tokens")
    correlation = {(kind, p): value for p in poolings for kind, value in alike.of(p).items()}
    return LayerReport(
        alike.texts, poolings, correlation, scorer.scores() if sets else None,
        None if reader is None else reader.profile(), [*notes, *alike.notes(), *scorer.notes()], seconds,
    )  # fmt: skip


def layer_scores(
    model: SentenceTransformer, pairs: Pairs | Mapping[str, Pairs], *, token_pooling: str = "all", **options: Any
) -> LayerScores:
    """The score of every layer alone. Arguments and errors: see `analyse`."""
    sets = checked(pairs)
    if not sets:
        raise ValueError("no pairs: a layer's score needs pairs of texts with gold scores")
    scorer = Scorer(poolings_of(token_pooling), sets)
    _pass(model, scorer.groups, scorer.poolings, [scorer], options)
    found = scorer.scores()
    for note in scorer.notes():
        logger.warning("%s", note)
    return found


def _pass(
    model: SentenceTransformer, groups: Sequence[tuple[str, ...]], poolings: Sequence[str], consumers: Sequence[Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    for window in windows(model, groups, poolings, **options):
        for consumer in consumers:
            consumer.add(window)


def _cut(model: Any) -> int:
    """How many texts an embedder of ours has cut so far."""
    return getattr(getattr(next(model.children(), None), "truncated", None), "count", 0)


def check_count(count: int, what: str) -> None:
    if count < FEWEST:
        raise ValueError(f"{count} {what}: unbiased CKA is defined from {FEWEST} on; a stable figure takes hundreds")


def checked(pairs: Pairs | Mapping[str, Pairs] | None) -> dict[str, Pairs]:
    sets = {"pairs": pairs} if isinstance(pairs, Pairs) else dict(pairs or {})
    for name, (first, second, scores) in sets.items():
        if not len(first) == len(second) == len(scores):
            raise ValueError(f"{name}: {len(first)} and {len(second)} texts with {len(scores)} scores")
        check_count(len(first), f"pairs in {name}")
        if len(set(scores)) == 1:
            raise ValueError(f"{name}: every score is {scores[0]}, so no correlation is defined")
    return sets


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass
class LayerReport:
    """What `analyse` found; prints as a table.

    Attributes:
        texts: how many the correlations are of. token_poolings: those of `analyse`.
        correlation: by (kind, token pooling), kind "pearson" or "cka": [L+1, L+1].
        scores: of the pairs, or None. profile: of the pool, or None.
        notes: what was not defined, cut or left out. seconds: the whole analysis took.
        encode_seconds: what a plain encode of the same texts took, where it was measured.
    """

    texts: int
    token_poolings: tuple[str, ...]
    correlation: dict[tuple[str, str], NDArray[np.float64]]
    scores: LayerScores | None
    profile: PoolProfile | None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    encode_seconds: float | None = None

    @property
    def num_layers(self) -> int:
        """L, the embedding not counted."""
        return len(next(iter(self.correlation.values()))) - 1

    def save(self, directory: str | Path) -> list[Path]:
        """Write layers_correlation.csv (kind, token_pooling, layer_i, layer_j, value) and .png, and what scores and
        profile write; returns the paths."""
        path = Path(directory) / "layers_correlation.csv"
        rows = (
            [kind, pooling, i, j, f"{value:.6f}"]
            for (kind, pooling), values in self.correlation.items()
            for (i, j), value in np.ndenumerate(values)
        )
        write_csv(path, ["kind", "token_pooling", "layer_i", "layer_j", "value"], rows)
        titles = {"pearson": "Pearson's r over dimensions", "cka": "linear CKA"}
        heat_maps(
            {f"{titles[kind]}, {pooling}": values for (kind, pooling), values in self.correlation.items()},
            "layer", "layer", path.with_suffix(".png"),
        )  # fmt: skip
        paths = [path, path.with_suffix(".png")]
        for part in (self.scores, self.profile):
            paths += part.save(directory) if part is not None else []
        return paths

    def __str__(self) -> str:
        layers = range(self.num_layers + 1)
        columns = {"layer": [str(layer) for layer in layers]}
        for pooling in self.token_poolings:
            pearson, cka = self.correlation["pearson", pooling], self.correlation["cka", pooling]
            columns[f"{pooling}: r to next"] = [f"{r:.3f}" for r in np.diag(pearson, 1)] + ["–"]
            columns[f"{pooling}: CKA to last"] = [f"{value:.3f}" for value in cka[:, -1]]
            if self.scores:
                columns[f"{pooling}: score"] = self.scores.starred(pooling)
        if self.profile:
            weights = dict(zip(self.profile.layers, self.profile.mean, strict=True))
            columns["read by the pool"] = [f"{weights[i]:.4f}" if i in weights else "–" for i in layers]
        table = aligned(list(columns), zip(*columns.values(), strict=True), left=0)
        return "\n".join([table, "", *self._reading()])

    def _reading(self) -> list[str]:
        lines = [f"{self.texts} texts; layer 0 is the embedding. r: Pearson's over dimensions; CKA: linear, unbiased."]
        if self.scores:
            lines.append(self.scores.reading())
        lines += [str(self.profile)] if self.profile else []
        lines += [f"Note: {note}" for note in self.notes]
        if self.encode_seconds:
            lines.append(
                f"The analysis took {self.seconds:.1f} s, {self.seconds / self.encode_seconds:.2f}x of a plain encode "
                f"of the same texts ({self.encode_seconds:.1f} s)"
            )
        return lines
