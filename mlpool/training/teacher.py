"""A larger model's word beside InfoNCE: its scores of an anchor's candidates, or its embeddings of all texts.

With scores, one row of data brings those of its own candidates, as `mlpool mine` writes them (by a larger embedder, or
by a cross-encoder). With embeddings, kept by `mlpool mine --embeddings`, the candidates are all documents of the batch.
Either way the student's part is a function of the batch's embeddings, so that it is cached as InfoNCE is.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..corpus.rows import BATCH
from ..corpus.text_store import SIDES, TextStore
from ..pooling.base import check_choice
from ..show import shorten, some
from .columns import text_columns

KINDS = ("kl", "cosine")
_SCORES = 2**24  # of anchors with documents, held at once in a forward or a backward pass


class Teacher:
    """`weight` times the distance from a teacher, the mean over anchors (of "cosine", over texts).

    Args:
        weight: beside InfoNCE, whose own weight is 1.
        temperature: T, what the teacher's scores are divided by. Of cosines 0.05 makes them as sharp as InfoNCE's own;
            scores of a cross-encoder between 0 and 1 want about the same, raw logits about 1.
        kind: "kl": KL(softmax(teacher / T) || softmax(student's cosines / τ)) over an anchor's candidates, τ being
            InfoNCE's temperature; with matryoshka_dims at each of them, with its weight. "cosine": 1 - the cosine of
            the student's whole embedding with the teacher's, which must be as wide.
        embeddings: a folder of `mlpool mine --embeddings`. Without it the data's scores are the teacher (`data.scores`
            in a config), and the kind is "kl". Texts that differ in case or white space alone share an embedding.

    Each process takes the candidates of its own batch, whatever `gather_across_devices` says.

    Raises:
        ValueError: a weight or temperature that is none, "cosine" without embeddings, embeddings that are damaged, not
            finite (the text is named) or of two models. FileNotFoundError: no such folder, or an unfinished one.

    Source: arXiv 1503.02531 (KL to a teacher's softmax).
    """

    def __init__(
        self, weight: float = 0.5, temperature: float = 0.05, *, kind: str = "kl", embeddings: str | None = None
    ) -> None:
        for name, value in (("temperature", temperature), ("weight", weight)):
            if not value > 0 or not math.isfinite(value):
                raise ValueError(f"the teacher's {name} must be above 0, got {value!r}")
        check_choice("the teacher's kind", kind, KINDS)
        if kind == "cosine" and embeddings is None:
            raise ValueError("the teacher's kind 'cosine' needs its embeddings; scores go with 'kl'")
        self.weight, self.temperature, self.kind, self.embeddings = weight, temperature, kind, embeddings
        self._stores: list[TextStore] = []
        if embeddings is not None:
            folder = Path(embeddings)
            self._stores = [TextStore(folder, side) for side in SIDES]
            if missing := [store.path.name for store in self._stores if not store.path.is_file()]:
                raise FileNotFoundError(
                    f"{folder} has no {missing[0]}; expected a folder that `mlpool mine --embeddings` filled, of the "
                    "teacher and these pairs"
                )
            if len(made := {store.model().get("identity") for store in self._stores}) > 1:
                raise ValueError(
                    f"{folder} has anchors and documents of different models, {some(sorted(map(str, made)))}; embed "
                    "both by one (mlpool mine --embeddings, with --overwrite)"
                )
            self._known = [store.embeddings() for store in self._stores]

    def options(self) -> dict[str, Any]:
        """As a config has them."""
        return {name: getattr(self, name) for name in ("weight", "temperature", "kind", "embeddings")}

    def check_width(self, width: int | None) -> None:
        """Raises ValueError where the student's embeddings, `width` numbers (None: not known), have no cosine with the
        teacher's."""
        if self.kind == "cosine" and width not in (None, self._known[0].width):
            raise ValueError(
                f"the teacher's embeddings have {self._known[0].width} numbers, the student's {width}: their cosine is "
                "not defined; use kind: kl, which compares scores"
            )

    def number(self, pairs: datasets.Dataset) -> datasets.Dataset:
        """The pairs with a column `label`: where each of a row's texts is among the teacher's. Unchanged without
        embeddings.

        Raises:
            ValueError: a text that the teacher has not embedded, named.
        """
        if not self._stores:
            return pairs
        numbers = []
        for i, name in enumerate(text_columns(pairs)):
            rows = pairs.select_columns(name).with_format(None)
            found = self._stores[min(i, 1)].find(text for batch in rows.iter(BATCH) for text in batch[name])
            if (found < 0).any():
                row = int(np.argmax(found < 0))
                raise ValueError(
                    f"the teacher's embeddings in {self.embeddings} lack {int((found < 0).sum()):,} of {len(found):,} "
                    f"texts in {name}, the first of pair {row + 1}: {shorten(rows[row][name])}; run `mlpool mine` on "
                    "these pairs with the teacher as --model"
                )
            numbers.append(found)
        return pairs.add_column("label", list(np.stack(numbers, axis=1)))

    # --- the loss --------------------------------------------------------------------------------------------------

    def __call__(
        self, embeddings: Tensor, labels: Tensor | None, temperature: float, dims: Sequence[int], weights: Tensor
    ) -> Tensor:
        """The distance, times `weight`; scalar.

        Args:
            embeddings: the student's [columns, B, D], float32 or wider.
            labels: what the trainer passes: scores [B, columns - 1] of each anchor's positive and negatives; with
                embeddings the numbers [B, columns] of `number`.
            temperature, dims, weights: of InfoNCE.
        """
        columns, batch = embeddings.shape[:2]
        expected = [batch, columns - (not self._stores)]
        if labels is None or list(labels.shape) != expected:
            got = "none" if labels is None else list(labels.shape)
            raise ValueError(
                f"a teacher needs its {'text numbers' if self._stores else 'scores'} as labels {expected}, got {got}; "
                "name the column of scores (data.scores) or give the teacher's embeddings"
            )
        if not self._stores:
            return self.weight * self._own(embeddings, labels.to(embeddings), temperature, dims, weights)
        known = [self._take(0, labels[:, :1], embeddings), self._take(1, labels[:, 1:], embeddings)]
        if self.kind == "cosine":
            self.check_width(embeddings.shape[-1])
            return self.weight * (1 - F.cosine_similarity(embeddings, torch.cat(known), dim=-1)).mean()
        return self.weight * self._in_batch(embeddings, known[0][0], known[1].flatten(0, 1), temperature, dims, weights)

    def _take(self, side: int, numbers: Tensor, like: Tensor) -> Tensor:
        """The teacher's embeddings [columns, B, E] of numbers [B, columns], at unit length."""
        found = torch.from_numpy(self._known[side].take(numbers.T.cpu().numpy()))
        return F.normalize(found.to(like), dim=-1)

    def _own(
        self, embeddings: Tensor, scores: Tensor, temperature: float, dims: Sequence[int], weights: Tensor
    ) -> Tensor:
        targets = (scores / self.temperature).softmax(-1)
        total = embeddings.new_zeros(())
        for dim, weight in zip(dims, weights, strict=True):
            part = F.normalize(embeddings[..., :dim], dim=-1)
            cosines = torch.einsum("bd,cbd->bc", part[0], part[1:])
            total = total + weight * _kl(cosines / temperature, targets)
        return total / len(scores)

    def _in_batch(
        self, embeddings: Tensor, anchors: Tensor, documents: Tensor, temperature: float, dims: Sequence[int],
        weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """Block after block of anchors, each scored again in the backward pass: no matrix of all scores is held."""

        def block(rows: slice, mine: Tensor, others: Tensor) -> Tensor:
            targets = (anchors[rows] @ documents.T / self.temperature).softmax(-1)
            total = mine.new_zeros(())
            for dim, weight in zip(dims, weights, strict=True):
                cosines = F.normalize(mine[rows, :dim], dim=-1) @ F.normalize(others[:, :dim], dim=-1).T
                total = total + weight * _kl(cosines / temperature, targets)
            return total

        size = max(1, _SCORES // len(documents))
        total = embeddings.new_zeros(())
        for start in range(0, len(anchors), size):
            one = partial(block, slice(start, start + size))
            total = total + checkpoint(one, embeddings[0], embeddings[1:].flatten(0, 1), use_reentrant=False)
        return total / len(anchors)


def _kl(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ KL(targets || softmax(logits)) over rows [B, candidates]."""
    return F.kl_div(logits.log_softmax(-1), targets, reduction="sum")
