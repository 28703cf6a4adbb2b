"""Depth: a model cut behind the highest layer that is read, so that no layer is computed, trained or saved for nothing.

What a cut model's top is. Its `last_hidden_state` is the output of layer k behind the base's own final norm, as in any
model of k layers: plain folders and serving tools read it so, and so do the pools of the last layer. A pool of several
layers reads every kept layer raw, the top one too: the very numbers that it read of them before the cut. (Of a whole
model the row of layer L is final-normed, as transformers' hidden_states[-1] is.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pooling.layers import select_layers
from ..taps import Taps
from ..trunk import find_layers, no_cache, text_config

_PROBE = 8  # tokens


def resolve_depth(depth: int | str, num_layers: int, layers: Sequence[int] | None) -> int | None:
    """How many of L layers to keep, None for all.

    Args:
        depth: a number of layers from the bottom, or "auto": up to the highest of `layers`. layers: indices into the
            whole model that are read, negatives counted from its end; None where the last kept one is what is read.

    Raises:
        ValueError: a depth of 0, above L or below a layer that is to be read; layers as of `select_layers`.
    """
    highest = None if layers is None else max(select_layers(layers, num_layers) or ())
    if depth == "auto":
        depth = num_layers if highest is None else highest + 1
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= num_layers:
        raise ValueError(
            f'depth is a number of layers to keep, from 1 to the {num_layers} that this model has, or "auto" (up to '
            f"the highest that is read); got {depth!r}"
        )
    if highest is not None and depth <= highest:
        raise ValueError(
            f"depth={depth} keeps the layers 0 … {depth - 1}, and layers={list(layers or ())} reads layer {highest} "
            f"(counted in the whole model of {num_layers}); take depth={highest + 1} or more, or lower layers"
        )
    return None if depth == num_layers else depth


def cut(model: nn.Module, depth: int) -> nn.Module:
    """Take the layers above the first `depth` off a model, in place, and return it; of a model cut before, nothing.

    What is left is tried on a few tokens: every kept layer must give the very numbers it gave before.

    Raises:
        ValueError: the model has fewer layers, or its layers depend on those above. Then it is as it was.
    """
    trunk, layers = find_layers(model)
    count = len(layers)
    if not 1 <= depth <= count:
        raise ValueError(f"depth={depth} layers cannot be kept of the {count} of {type(trunk).__name__}")
    if depth == count:
        return model
    config = text_config(trunk)
    before, above, kept = _rows(model, depth), list(layers)[depth:], _per_layer(config, count)
    del layers[depth:]
    _set(config, {name: value[:depth] for name, value in kept.items()}, depth)
    try:
        after = _rows(model, depth)
    except Exception as error:
        after, reason = None, f" ({error})"
    else:
        reason = ""
    if after is None or not torch.equal(before, after):
        layers.extend(above)
        _set(config, kept, count)
        raise ValueError(
            f"{type(trunk).__name__} cannot be cut to {depth} of {count} layers: without those above, the kept ones "
            f"give other numbers{reason}; load it with depth={count}"
        )
    return model


@torch.no_grad()
def _rows(model: nn.Module, depth: int) -> Tensor:
    """Of a few tokens, the state of the last in each of the first `depth` layers, [1, depth, D]."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    ids = torch.arange(_PROBE, device=weight.device)[None] % weight.shape[0]
    with Taps(model, layers=range(depth), final_norm=False) as taps:
        # Without a cache, whose kind is looked up by layer.
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **no_cache(taps.trunk))
        return taps.take()


def _per_layer(config: Any, count: int) -> dict[str, list[Any]]:
    """What a config lists layer by layer: kinds of attention, which have positions."""
    return {
        name: list(value)
        for name, value in vars(config).items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count
    }


def _set(config: Any, lists: dict[str, list[Any]], count: int) -> None:
    config.num_hidden_layers = count
    for name, value in lists.items():
        setattr(config, name, value)
