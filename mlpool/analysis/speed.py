"""How fast a model would be at each depth: one pass over a few texts, timed layer by layer."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from ..trunk import find_layers
from .states import _batches

MOST = 128  # texts


@torch.inference_mode()
def seconds_by_depth(
    model: SentenceTransformer, texts: Sequence[str], *, prompt: str | None = None, token_budget: int | None = None
) -> NDArray[np.float64]:
    """[L+1]: seconds that embedding the texts takes, tokenizing included, if the model is cut behind layer k.

    What ran above layer k is taken off the time of the whole; entry L is the whole.
    """
    _, layers = find_layers(model)
    clock = _Clock(len(layers), model.device)
    model.eval()
    backbone: Any = next(model.children())
    if hasattr(backbone, "arrange"):
        backbone.arrange()
    handles = [layers[0].register_forward_pre_hook(functools.partial(clock.read, 0))]
    handles += [layer.register_forward_hook(functools.partial(clock.read, i)) for i, layer in enumerate(layers, 1)]
    try:
        for _ in _batches(model, list(texts[:8]), prompt, token_budget):  # what only a first call does
            pass
        clock.spent[:] = 0
        began = time.perf_counter()
        for _ in _batches(model, list(texts), prompt, token_budget):
            pass
        whole = time.perf_counter() - began
    finally:
        for handle in handles:
            handle.remove()
    above = clock.spent[::-1].cumsum()[::-1]  # of layer k and those above it
    return whole - np.append(above, 0.0)


class _Clock:
    """Seconds spent in each layer."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.spent, self._device, self._last = np.zeros(count), device, 0.0

    def read(self, layer: int, *_: Any) -> None:
        """At the end of a layer, 0 for the start of the first; a hook."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if layer:
            self.spent[layer - 1] += now - self._last
        self._last = now
