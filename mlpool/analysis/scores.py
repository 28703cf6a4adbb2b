"""The score of every layer: of pairs from their cosines, window by window, and as what comes out; see command.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..files import write_csv
from ..show import aligned
from .plots import layer_curves
from .states import Window

_NARROW = 1e-6  # range of cosines, below which there is nothing but rounding


class Pairs(NamedTuple):
    """A data set of pairs with gold scores, all of one length."""

    first: Sequence[str]
    second: Sequence[str]
    scores: Sequence[float]


@dataclass(frozen=True)
class LayerScores:
    """Scores by layer.

    sets: names of the data sets. values: by token pooling, [sets, L+1]. own: [sets], of the model's own embedding.
    metrics: what the scores are.
    """

    sets: list[str]
    values: dict[str, NDArray[np.float64]]
    own: NDArray[np.float64]
    metrics: tuple[str, ...] = ("Spearman",)

    def __add__(self, other: "LayerScores") -> "LayerScores":
        """Those of further data sets behind these."""
        values = {pooling: np.concatenate([rows, other.values[pooling]]) for pooling, rows in self.values.items()}
        metrics = tuple(dict.fromkeys((*self.metrics, *other.metrics)))
        return LayerScores([*self.sets, *other.sets], values, np.concatenate([self.own, other.own]), metrics)

    def __str__(self) -> str:
        columns = [self.starred(pooling) for pooling in self.values]
        lines = zip(map(str, range(len(columns[0]))), *columns, strict=True)
        return "\n".join([aligned(["layer", *self.values], lines, left=0), "", self.reading()])

    def starred(self, pooling: str) -> list[str]:
        """The mean over the data sets by layer, the best one starred."""
        best = self.best(pooling)
        return [f"{score:.4f}{'*' if layer == best else ' '}" for layer, score in enumerate(self.mean(pooling))]

    def reading(self) -> str:
        """What the scores are, in a line."""
        sets = f"mean over {len(self.sets)} data sets" if len(self.sets) > 1 else self.sets[0]
        return (
            f"Score: {', '.join(self.metrics)}, {sets}; * the best, chosen on this data. The model's own embedding: "
            f"{self.own.mean():.4f}"
        )

    def best_depth(self) -> tuple[str, int]:
        """Token pooling and layer of the highest mean, the embedding (layer 0) aside: where a model may be cut."""
        best = {p: int(self.mean(p)[1:].argmax()) + 1 for p in self.values}
        pooling = max(best, key=lambda p: self.mean(p)[best[p]])
        return pooling, best[pooling]

    def mean(self, pooling: str) -> NDArray[np.float64]:
        """[L+1], over the data sets."""
        return self.values[pooling].mean(0)

    def best(self, pooling: str) -> int:
        """The layer with the highest mean; of several equal ones the first."""
        return int(self.mean(pooling).argmax())

    def save(self, directory: str | Path) -> list[Path]:
        """Write layers_score.csv (data_set, token_pooling, layer, score, best) and layers_score.png.

        The model's own embedding has the token pooling "embedding" and no layer; several sets have a "mean".
        """
        path = Path(directory) / "layers_score.csv"
        several = len(self.sets) > 1
        names = [*self.sets, "mean"] if several else self.sets
        rows: list[list[Any]] = [
            [name, pooling, layer, f"{score:.6f}", int(layer == row.argmax())]
            for pooling, values in self.values.items()
            for name, row in zip(names, [*values, values.mean(0)], strict=False)
            for layer, score in enumerate(row)
        ]
        own = zip(names, [*self.own, self.own.mean()], strict=False)
        rows += [[name, "embedding", "", f"{score:.6f}", ""] for name, score in own]
        write_csv(path, ["data_set", "token_pooling", "layer", "score", "best"], rows)
        layer_curves(
            {pooling: self.mean(pooling) for pooling in self.values}, float(self.own.mean()),
            ", ".join(self.metrics) + ", " + (f"mean of {len(self.sets)} data sets" if several else self.sets[0]),
            path.with_suffix(".png"),
        )  # fmt: skip
        return [path, path.with_suffix(".png")]


class Scorer:
    """Cosines of every layer for all pairs of all sets: [pairs, P, L+1] numbers are kept, no states."""

    def __init__(self, poolings: Sequence[str], sets: Mapping[str, Pairs]):
        self.poolings, self.sets = poolings, sets
        self.groups = [pair for first, second, _ in sets.values() for pair in zip(first, second, strict=True)]
        self._cosines: Any = None
        self._own = np.zeros(len(self.groups))
        self._notes: list[str] = []

    @torch.inference_mode()
    def add(self, window: Window) -> None:
        cosines = F.cosine_similarity(window.states[0].float(), window.states[1].float(), dim=-1).cpu().numpy()
        if self._cosines is None:
            self._cosines = np.zeros((len(self.groups), *cosines.shape[1:]), np.float32)
        self._cosines[window.rows] = cosines
        self._own[window.rows] = F.cosine_similarity(*window.embeddings.float()).cpu().numpy()

    def scores(self) -> LayerScores:
        values: dict[str, list[NDArray[np.float64]]] = {pooling: [] for pooling in self.poolings}
        own, start = [], 0
        for name, (first, _, gold) in self.sets.items():
            rows = slice(start, start := start + len(first))
            for i, pooling in enumerate(self.poolings):
                columns = self._cosines[rows, i].T
                values[pooling].append(
                    np.array([self._spearman(gold, c, f"{name}, {pooling}, layer {n}") for n, c in enumerate(columns)])
                )
            own.append(self._spearman(gold, self._own[rows], f"{name}, the model's embedding"))
        return LayerScores(list(self.sets), {p: np.stack(v) for p, v in values.items()}, np.array(own))

    def _spearman(self, gold: Sequence[float], cosines: NDArray[Any], what: str) -> float:
        from scipy.stats import spearmanr

        if np.ptp(cosines) <= _NARROW:
            self._notes.append(f"{what}: every pair has the same cosine; no correlation is defined, given as 0")
            return 0.0
        return float(spearmanr(gold, cosines).statistic)

    def notes(self) -> list[str]:
        return list(dict.fromkeys(self._notes))
