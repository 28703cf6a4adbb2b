"""One row per text of every layer, for many texts: one pass of the model, in the memory of one window of them.

The model runs as `encode` runs it (its own batches, packed where it is packed), with hooks that read the states on the
way: the last token's, the tokens' mean or the mean of unit tokens, of the input of layer 1 (called layer 0, the
embedding), of the output of layers 1 … L-1, and of the last state, behind the final norm. These are transformers'
hidden_states[0 … L]. `mlpool.taps` has neither layer 0 nor several poolings at once; what it has more, gradients, no
analysis needs.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from .. import show
from ..embedder.embedder import Embedder
from ..pooling.base import gather_tokens
from ..pooling.tokens import Tokens, select_tokens
from ..trunk import find_layers
from . import FEWEST, POOLINGS, WINDOW

_ST_BATCH = 32  # texts a forward of models that do not batch by tokens, as in their own encode


@dataclass(frozen=True)
class Window:
    """Some groups of texts and what the model made of them. A group is one text, or the two of a pair.

    rows: [n], which of the groups. states: [A, n, P, L+1, D], P the token poolings; A is 1, or 2 for pairs.
    embeddings: [A, n, E], the model's own.
    """

    rows: NDArray[np.int64]
    states: Tensor
    embeddings: Tensor


def poolings_of(token_pooling: str) -> tuple[str, ...]:
    """The token poolings that a name, or "all", means; anything else is a ValueError."""
    if token_pooling == "all":
        return POOLINGS
    if token_pooling not in POOLINGS:
        raise ValueError(f'token_pooling must be one of {POOLINGS} or "all", got {token_pooling!r}')
    return (token_pooling,)


def windows(
    model: SentenceTransformer,
    groups: Sequence[tuple[str, ...]],
    token_poolings: Sequence[str] = POOLINGS,
    *,
    window: int = WINDOW,
    prompt: str | None = None,
    token_budget: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Window]:
    """Run every text once.

    Windows are drawn at random, and only within one are the texts batched by length: what is estimated from a window
    holds for all texts, not for those of one length.

    Args:
        model: any SentenceTransformer whose layers are found; put into evaluation mode, as by `encode`.
        groups: all of one size, 1 or 2; the texts of a group are in the same window.
        window: texts at a time, at most, but no fewer than 4 groups. Their states are what is kept:
            window · P · (L+1) · D numbers.
        prompt: put before each text; None is the model's default prompt.
        token_budget: tokens a forward, for mlpool's embedders; None as in their encode.
        seed: of the windows.

    Raises:
        ValueError: a model whose layers are not found, a window or token_budget below 1, texts that are no strings.
        RuntimeError: a layer that ran more or less than once in a forward, or gave something else than [B, T, D].
    """
    for name, size in (("window", window), ("token_budget", token_budget)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if prompt is None:
        prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    arity = len(groups[0])
    count = max(1, min(math.ceil(len(groups) * arity / window), len(groups) // FEWEST))
    parts = np.array_split(np.random.default_rng(seed).permutation(len(groups)), count)
    model.eval()
    backbone: Any = next(model.children())
    if hasattr(backbone, "arrange"):  # before there are hooks: packing tries itself out
        backbone.arrange()
    with (
        _Recorder(model, token_poolings) as recorder,
        show.progress("layers", "text", len(groups) * arity, progress) as bar,
    ):
        for rows in parts:
            texts = [groups[row][i] for i in range(arity) for row in rows]
            states, embeddings = _run(model, recorder, texts, prompt, token_budget, bar)
            yield Window(rows, states.unflatten(0, (arity, -1)), embeddings.unflatten(0, (arity, -1)))


@torch.inference_mode()
def _run(
    model: SentenceTransformer, recorder: "_Recorder", texts: list[str], prompt: str | None, token_budget: int | None,
    bar: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    states = embeddings = torch.empty(0)
    for part, rows in _batches(model, texts, prompt, token_budget):
        found = recorder.take()
        if not len(states):
            states = found.new_empty(len(texts), *found.shape[1:])
            embeddings = rows.new_empty(len(texts), rows.shape[1])
        states[part], embeddings[part] = found, rows
        bar.update(len(part))
    return states, embeddings


def _batches(
    model: Any, texts: list[str], prompt: str | None, token_budget: int | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of `texts` and their embeddings, forward by forward, longest first."""
    if isinstance(model, Embedder):
        tokens = model.backbone.token_ids(texts, prompt)
        budget = token_budget or model.default_budget(model.device)
        yield from model._batches(tokens, budget, len(texts), model.device)
        return
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    for start in range(0, len(order), _ST_BATCH):
        part = order[start : start + _ST_BATCH]
        features = batch_to_device(model.preprocess([texts[row] for row in part], prompt=prompt), model.device)
        yield part, model(features)["sentence_embedding"]


class _Recorder:
    """Hooks on a SentenceTransformer that keep the pooled rows of every layer of its last forward."""

    def __init__(self, model: Any, token_poolings: Sequence[str]):
        trunk, layers = find_layers(model)
        self.name, self.token_poolings, self.count = type(trunk).__name__, tuple(token_poolings), len(layers) + 1
        first = next(model.children())
        self._features: dict[str, Any] = {}  # of the forward that runs, and its tokens and rows
        self._tokens: Tokens | None = None
        self._rows: dict[int, Tensor] = {}
        self._handles = [
            first.register_forward_pre_hook(self._begin),
            layers[0].register_forward_pre_hook(self._read_embedding, with_kwargs=True),
            *(layer.register_forward_hook(functools.partial(self._read, i)) for i, layer in enumerate(layers[:-1], 1)),  # type: ignore[index]
            first.register_forward_hook(self._read_last),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> Tensor:
        """[B, P, L+1, D] of the last forward."""
        rows, self._rows = self._rows, {}
        if missing := [index for index in range(self.count) if index not in rows]:
            raise RuntimeError(
                f"layer(s) {missing} of {self.name} did not run in this forward (layer drop, early exit?)"
            )
        if len(widths := {row.shape[-1] for row in rows.values()}) > 1:
            raise ValueError(f"the layers of {self.name} differ in width ({widths}) and cannot be compared")
        device = rows[self.count - 1].device
        return torch.stack([rows[index].to(device) for index in range(self.count)], 2)

    def _begin(self, module: Any, args: tuple[dict[str, Any], ...]) -> None:
        self._features, self._tokens, self._rows = args[0], None, {}

    def _read_embedding(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._keep(0, args[0] if args else kwargs["hidden_states"])

    def _read(self, index: int, module: Any, args: tuple, output: Any) -> None:
        self._keep(index, output[0] if isinstance(output, tuple) else output)

    def _read_last(self, module: Any, args: tuple, features: dict[str, Any]) -> None:
        self._keep(self.count - 1, features["token_embeddings"])

    def _keep(self, index: int, hidden: Tensor) -> None:
        tokens = self._tokens_of(hidden)
        if index in self._rows or hidden.dim() != 3 or hidden.shape[:2] != tokens.shape:
            raise RuntimeError(
                f"layer {index} of {self.name} ran twice in one forward, or gave {list(hidden.shape)} where "
                f"{[*tokens.shape, 'D']} was expected; a model that runs a layer again, or removes padding inside, "
                "cannot be analysed"
            )
        self._rows[index] = torch.stack(
            [gather_tokens([hidden], tokens, pooling, "auto")[:, 0] for pooling in self.token_poolings], 1
        )

    def _tokens_of(self, hidden: Tensor) -> Tokens:
        """The kept tokens of this forward, on the device where it has come to."""
        if self._tokens is None:
            features = self._features
            offsets = features.get("cu_seqlens", features.get("cu_seq_lens_q"))
            self._tokens = select_tokens(
                hidden.shape, hidden.device, features["attention_mask"] if offsets is None else None, offsets,
                features.get("token_mask"),
            )  # fmt: skip
        elif self._tokens.last.device != hidden.device:
            self._tokens = self._tokens.to(hidden.device)
        return self._tokens
