"""Which layers a pool reads: its `layers` subset, and the two ways in, hidden states or gathered layer states."""

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from .base import check_hidden_states


class ReadsLayers(Protocol):
    """A pool over `num_layers` layers of `hidden_size`, or the subset `layers` of them."""

    hidden_size: int
    num_layers: int
    layers: list[int] | None


def select_layers(layers: Sequence[int] | None, num_layers: int) -> list[int] | None:
    """Indices into 0 … L-1, negatives counted from the end; increasing and without repeats, or a ValueError."""
    if layers is None:
        return None
    try:
        indices = [operator.index(i) for i in layers]
    except TypeError:
        raise ValueError(f"layers must be a list of integers, got {layers!r}") from None
    outside = [i for i in indices if not -num_layers <= i < num_layers]
    if not indices or outside:
        raise ValueError(
            f"layers must name at least one of 0 … {num_layers - 1} (or -{num_layers} … -1), got {list(layers)}"
        )
    indices = [i % num_layers for i in indices]
    if any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"layers must increase and not repeat, got {list(layers)} of {num_layers} layers")
    return indices


def read_layers(pool: ReadsLayers, hidden_states: Sequence[Tensor] | None, includes_embedding: bool) -> list[Tensor]:
    """The L (or selected) hidden states out of what transformers returned, checked.

    Raises:
        ValueError: nothing given, a wrong number of layers (L where L+1 was expected says so), a wrong D.
    """
    if hidden_states is None:
        raise ValueError("got neither hidden_states nor layer_states; pass one of them")
    if isinstance(hidden_states, Tensor):
        raise TypeError(
            f"hidden_states must be a sequence of {pool.num_layers + includes_embedding} tensors [B, T, D], got one "
            f"tensor of shape {list(hidden_states.shape)}; for gathered rows [B, L, D] pass layer_states="
        )
    states = list(hidden_states)
    check_hidden_states(states)
    expected = pool.num_layers + includes_embedding
    if len(states) != expected:
        hint = ""
        if includes_embedding and len(states) == pool.num_layers:
            hint = "; these look like the L layers without the embedding: pass includes_embedding=False"
        elif not includes_embedding and len(states) == pool.num_layers + 1:
            hint = "; these look like L layers with the embedding first: leave out includes_embedding=False"
        what = "the embedding and " if includes_embedding else ""
        raise ValueError(f"expected {expected} hidden states ({what}{pool.num_layers} layers), got {len(states)}{hint}")
    if states[0].shape[-1] != pool.hidden_size:
        raise ValueError(f"hidden states must have D = {pool.hidden_size}, got shape {list(states[0].shape)}")
    states = states[1:] if includes_embedding else states
    return states if pool.layers is None else [states[i] for i in pool.layers]


def last_state(hidden_states: Tensor | Sequence[Tensor], hidden_size: int | None) -> Tensor:
    """The last hidden state, given alone or as the last of a sequence, checked like `read_layers` does."""
    states = [hidden_states] if isinstance(hidden_states, Tensor) else list(hidden_states)[-1:]
    check_hidden_states(states)
    if hidden_size is not None and states[0].shape[-1] != hidden_size:
        raise ValueError(f"hidden states must have D = {hidden_size}, got shape {list(states[0].shape)}")
    return states[0]


def read_layer_states(pool: ReadsLayers, hidden_states: Sequence[Tensor] | None, layer_states: Tensor) -> Tensor:
    """layer_states [B, L, D], of all layers or of the selected ones, checked; the selected ones are returned."""
    if hidden_states is not None:
        raise ValueError("got both hidden_states and layer_states; pass one of them")
    count = pool.num_layers if pool.layers is None else len(pool.layers)
    if not isinstance(layer_states, Tensor):
        raise TypeError(
            f"layer_states must be a tensor [B, {count}, {pool.hidden_size}], got {type(layer_states).__name__}; stack "
            "the layers' rows, or pass hidden_states"
        )
    shape = list(layer_states.shape)
    if len(shape) != 3 or shape[2] != pool.hidden_size or shape[1] not in (count, pool.num_layers):
        raise ValueError(f"layer_states must be [B, {count}, {pool.hidden_size}], got {shape}")
    if shape[0] == 0:
        raise ValueError(f"got a batch of no texts (layer_states {shape}); B must be at least 1")
    if not layer_states.dtype.is_floating_point:
        raise TypeError(f"layer_states must be floating, got {layer_states.dtype}")
    if pool.layers is not None and shape[1] != count:
        return layer_states[:, pool.layers]
    return layer_states
