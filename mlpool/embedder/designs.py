"""The designs: which attention, which pool. 1 to 5 are the paper's (arXiv 2409.02727), three are controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pooling import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from ..pooling.base import Pool


@dataclass(frozen=True)
class Design:
    """One design.

    Attributes:
        number: the paper's, or None for a control. attention: "causal" or "bidirectional".
        pool: the class of mlpool.pooling. token_pooling: "last" or "mean", which row of a layer counts.
    """

    name: str
    number: int | None
    attention: str
    pool: type[Pool]
    token_pooling: str

    @property
    def reads_all_layers(self) -> bool:
        return self.pool in (MultiLayerPool, LayerWeightsPool)

    @property
    def trainable(self) -> bool:
        """Whether the pool has parameters."""
        return self.pool not in (EosPool, MeanPool)

    @property
    def has_latents(self) -> bool:
        """Whether the pool is the paper's cross-attention, which comes in sizes."""
        return self.pool in (MultiLayerPool, LastLayerPool)


DESIGNS = {
    design.name: design
    for design in (
        Design("eos-causal", 1, "causal", EosPool, "last"),
        Design("last-layer-causal", 2, "causal", LastLayerPool, "last"),
        Design("multi-layer-causal", 3, "causal", MultiLayerPool, "last"),
        Design("last-layer-bidirectional", 4, "bidirectional", LastLayerPool, "mean"),
        Design("multi-layer-bidirectional", 5, "bidirectional", MultiLayerPool, "mean"),
        Design("mean-causal", None, "causal", MeanPool, "mean"),
        Design("mean-bidirectional", None, "bidirectional", MeanPool, "mean"),
        Design("layer-weights-bidirectional", None, "bidirectional", LayerWeightsPool, "mean"),
    )
}


def find_design(name: str | int | None) -> Design:
    """A design by its name, or the paper's number 1 to 5.

    Raises:
        ValueError: none such; the message lists them.
    """
    for design in DESIGNS.values():
        if name is not None and str(name) in (design.name, str(design.number or design.name)):
            return design
    known = ", ".join(f"{d.name} (the paper's {d.number})" if d.number else d.name for d in DESIGNS.values())
    given = "no design was given" if name is None else f"there is no design {name!r}"
    raise ValueError(f"{given}; choose one of {known}")


def build_pool(
    design: Design,
    hidden_size: int,
    num_layers: int,
    pooler: str | Mapping[str, Any] = "default",
    layers: Sequence[int] | None = None,
) -> Pool:
    """The pool of a design for a backbone of D = hidden_size and L = num_layers.

    Args:
        pooler: "default" (small, starts exactly at EOS or mean pooling), "paper" (the released sizes and equations), or
            arguments of the pool's class, e.g. {"num_latents": 32, "residual": False}.
        layers: the layers to read, for designs that read all; increasing indices, negatives counted from the end.

    Raises:
        ValueError: a pooler or layers that the design has no use for, unknown or wrong arguments.
    """
    if not isinstance(pooler, Mapping) and pooler not in ("default", "paper"):
        raise ValueError(f'pooler must be "default", "paper" or a dict of sizes, got {pooler!r}')
    sizes = dict(pooler) if isinstance(pooler, Mapping) else {}
    if "token_pooling" in sizes or "layers" in sizes:
        raise ValueError(
            f"pooler={pooler!r}: token_pooling is set by the design ({design.name}: {design.token_pooling}), and "
            "layers is an argument of its own"
        )
    if not design.has_latents and pooler != "default":
        raise ValueError(f'{design.name} has no latents to size; leave pooler at "default", got {pooler!r}')
    if layers is not None and not design.reads_all_layers:
        raise ValueError(f"layers={list(layers)} were given, but {design.name} reads the last layer only")
    if not design.trainable:
        return design.pool(hidden_size)  # type: ignore[call-arg]
    arguments: tuple[int, ...] = (hidden_size,)
    if design.reads_all_layers:
        arguments += (num_layers,)
        if layers is not None:
            sizes["layers"] = list(layers)
    make = design.pool.paper if pooler == "paper" else design.pool  # type: ignore[attr-defined]
    try:
        return make(*arguments, token_pooling=design.token_pooling, **sizes)
    except TypeError as error:
        raise ValueError(f"pooler={pooler!r} does not fit {design.pool.__name__}: {error}") from error
