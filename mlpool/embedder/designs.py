"""The designs: which attention, which pool. 1 to 5 are the paper's (arXiv 2409.02727), four are controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..pooling import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from ..pooling.base import TOKEN_POOLINGS, Pool, check_choice, package_of
from ..pooling.registry import absent, announced, register_pool

GROUP = "mlpool.designs"


@dataclass(frozen=True)
class Design:
    """One design.

    Attributes:
        number: the paper's, or None for a control. attention: "causal" or "bidirectional".
        pool: its class. token_pooling: "last" or "mean", which row of a layer counts.
    """

    name: str
    number: int | None
    attention: str
    pool: type[Pool]
    token_pooling: str

    @property
    def reads_all_layers(self) -> bool:
        return self.pool.reads_all_layers

    @property
    def trainable(self) -> bool:
        """Whether the pool has parameters."""
        return self.pool.trainable

    @property
    def has_latents(self) -> bool:
        """Whether the pool is the paper's cross-attention, which comes in sizes."""
        return self.pool.has_latents

    @property
    def package(self) -> str | None:
        """The package whose pool it is; None for ours."""
        return package_of(self.pool)


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
        Design("multi-layer-causal-mean", None, "causal", MultiLayerPool, "mean"),
        Design("layer-weights-bidirectional", None, "bidirectional", LayerWeightsPool, "mean"),
    )
}


def register_design(
    name: str, attention: str, pool: type[Pool], token_pooling: str = "mean", number: int | None = None
) -> Design:
    """Add a design of your own, which `mlpool.load`, `train` and `study` then know by its name.

    An installed package announces one as an entry point of the group `mlpool.designs` that names a `Design`.

    Args:
        name: not a number, not one that is taken. attention: "causal" or "bidirectional".
        pool: its class, registered here if it is not yet. token_pooling: which row of a layer counts, see `gather`.

    Raises:
        ValueError: a name that is taken or a number, an unknown attention or token pooling. TypeError: no pool class.
    """
    check_choice("attention", attention, ("causal", "bidirectional"))
    check_choice("token_pooling", token_pooling, TOKEN_POOLINGS)
    if not isinstance(name, str) or not name.strip() or name.strip().isdigit():
        raise ValueError(f"a design's name must be a word, and no number (1 to 5 are the paper's), got {name!r}")
    design = Design(name, number, attention, register_pool(pool), token_pooling)
    if DESIGNS.setdefault(name, design) != design:
        raise ValueError(f"there is a design {name!r} already: {DESIGNS[name]}; give yours another name")
    return design


def find_design(name: str | int | None, package: str | None = None) -> Design:
    """A design by its name, or the paper's number 1 to 5.

    Args:
        package: of a saved folder whose design is somebody's own, for the error's sake alone.

    Raises:
        ValueError: none such; the message lists them. ModuleNotFoundError: its package is not here.
    """
    if name is not None and str(name) not in DESIGNS and (found := announced(GROUP, str(name))) is not None:
        register_design(found.name, found.attention, found.pool, found.token_pooling)
    for design in DESIGNS.values():
        if name is not None and str(name) in (design.name, str(design.number or design.name)):
            return design
    if package:
        raise ModuleNotFoundError(absent("design", str(name), package, GROUP), name=package)
    known = ", ".join(f"{d.name} (the paper's {d.number})" if d.number else d.name for d in DESIGNS.values())
    given = "no design was given" if name is None else f"there is no design {name!r}"
    raise ValueError(f"{given}; choose one of {known}")


def build_pool(
    design: Design,
    hidden_size: int,
    num_layers: int,
    pooler: str | Mapping[str, Any] = "default",
    layers: Sequence[int] | None = None,
    untuned: bool = False,
) -> Pool:
    """The pool of a design for a backbone of D = hidden_size and L = num_layers.

    Args:
        pooler: "default" (small; see `untuned` for its start), "paper" (the released sizes and equations), or
            arguments of the pool's class, e.g. {"num_latents": 32, "residual": False}.
        layers: the layers to read, for designs that read all; increasing indices, negatives counted from the end.
        untuned: whether the backbone is a language model as it was pretrained. Its last layer predicts tokens, so that
            a pool of all layers starts, unless told where, at their even mix and whitens it; all others start at
            exactly EOS or mean pooling.

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
    if (pooler == "paper" and not design.has_latents) or (sizes and not design.trainable):
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
    mixes = issubclass(design.pool, MultiLayerPool) and pooler != "paper" and sizes.get("residual", "mix") == "mix"
    if untuned and mixes and "start" not in sizes:
        sizes = {"whiten": True, **sizes, "start": "all"}
    make = design.pool.paper if pooler == "paper" else design.pool  # type: ignore[attr-defined]
    try:
        return make(*arguments, token_pooling=design.token_pooling, **sizes)
    except TypeError as error:
        raise ValueError(f"pooler={pooler!r} does not fit {design.pool.__name__}: {error}") from error
