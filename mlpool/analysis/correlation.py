"""How alike the layers of a model are: Pearson's r and linear CKA, summed up over windows of texts.

Both are defined in command.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .states import Window

_CONSTANT = 1e-10  # variance over mean square, below which there is nothing but rounding


class Correlations:
    """Running sums of both correlations, float64 [L+1, L+1] for each token pooling."""

    def __init__(self, poolings: Sequence[str]):
        self.poolings, self.texts, self.windows = poolings, 0, 0
        self._pearson: Any = [0.0] * len(poolings)
        self._hsic: Any = [0.0] * len(poolings)
        self._flat: Any = [0] * len(poolings)  # texts of constant state, by layer

    @torch.inference_mode()
    def add(self, window: Window) -> None:
        for states in window.states:  # the texts of pairs apart: a window holds no text together with its partner
            self.texts, self.windows = self.texts + len(states), self.windows + 1
            for i in range(len(self.poolings)):
                pearson, flat = pearson_sum(states[:, i])
                self._pearson[i] += pearson
                self._flat[i] += flat
                self._hsic[i] += hsic(states[:, i])

    def of(self, pooling: str) -> dict[str, NDArray[np.float64]]:
        i = self.poolings.index(pooling)
        own = np.sqrt(np.diag(self._hsic[i]))
        with np.errstate(invalid="ignore", divide="ignore"):
            cka = np.where(np.outer(own, own) > 0, self._hsic[i] / np.outer(own, own), 0.0)
        return {"pearson": self._pearson[i] / self.texts, "cka": cka}

    def notes(self) -> list[str]:
        found = []
        for i, pooling in enumerate(self.poolings):
            if same := np.flatnonzero(np.diag(self._hsic[i]) == 0).tolist():
                found.append(
                    f"{pooling}: every text has the same state in layer {', '.join(map(str, same))}; its CKA is not "
                    "defined, given as 0"
                )
            if flat := np.flatnonzero(self._flat[i]).tolist():
                found.append(
                    f"{pooling}: states of D equal numbers in layer {', '.join(map(str, flat))}; their Pearson "
                    "correlation is not defined and counts as 0"
                )
        return found


def pearson_sum(states: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """states [n, L+1, D] → the sum over texts of Pearson's r between layers over D [L+1, L+1]; constant states [L+1].

    A constant state has no correlation and adds 0.
    """
    total: Any = 0.0
    flat: Any = 0
    for part in states.split(64):
        x = part.float()
        square = x.square().mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
        constant = x.square().mean(-1, keepdim=True) <= _CONSTANT * square
        x = F.normalize(x, dim=-1).masked_fill(constant, 0)
        total += (x @ x.mT).sum(0).cpu().double().numpy()
        flat += constant[..., 0].sum(0).cpu().numpy()
    return total, flat


def hsic(states: Tensor) -> NDArray[np.float64]:
    """states [n, L+1, D], n at least 4 → unbiased HSIC between layers with linear kernels, [L+1, L+1].

    HSIC₁(K, L) = ⟨K̃, L̃⟩ / (n (n-3)) with Gram matrices centred so that every row sums to 0 without the diagonal
    (Song et al. 2012, in the form of Székely & Rizzo 2014). A layer in which all texts are alike gives 0.
    """
    n, layers, _ = states.shape
    grams = states.new_empty(layers, n * n, dtype=torch.float32)
    for layer in range(layers):
        x = states[:, layer].float()
        square = x.square().mean()
        x = x - x.mean(0)  # changes nothing in exact arithmetic, but large means drown the differences
        if x.square().mean() <= _CONSTANT * square:
            x = torch.zeros_like(x)
        gram = (x @ x.T).fill_diagonal_(0)
        rows = gram.sum(0) / (n - 2)
        gram = gram - rows - rows[:, None] + rows.sum() / (n - 1)
        grams[layer] = gram.fill_diagonal_(0).flatten()
    return (grams @ grams.T).cpu().double().numpy() / (n * (n - 3))
