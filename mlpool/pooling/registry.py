"""Pools by name: ours, those that a program registered, and those that an installed package announces.

A package announces its pools as entry points of the group `mlpool.pools`, so that a saved folder loads without an
import by hand. Nothing is ever imported because a folder names it: only what is installed and announced, or registered.
"""

import importlib.metadata
from typing import Any

from .base import Pool
from .last_layer import LastLayerPool
from .multi_layer import MultiLayerPool
from .simple import EosPool, LayerWeightsPool, MeanPool

GROUP = "mlpool.pools"
POOLS: dict[str, type[Pool]] = {
    pool.__name__: pool for pool in (MultiLayerPool, LastLayerPool, LayerWeightsPool, EosPool, MeanPool)
}


def register_pool(pool: type[Pool]) -> type[Pool]:
    """Make a pool of your own one that folders, designs, training and studies know; works as a decorator.

        @mlpool.register_pool
        class MaxPool(mlpool.Pool): ...

    Args:
        pool: a subclass of `mlpool.Pool`. Its constructor's arguments, kept as attributes of the same names, are its
            config; `forward` returns an embedding [B, D] of `hidden_states`, or of `layer_states` [B, L, D] where
            `reads_all_layers` is set.

    Returns: the class itself.

    Raises:
        TypeError: no subclass of `mlpool.Pool`. ValueError: another pool has that name.
    """
    if not (isinstance(pool, type) and issubclass(pool, Pool)):
        raise TypeError(f"register_pool takes a subclass of mlpool.Pool, got {pool!r}")
    known = POOLS.setdefault(pool.__name__, pool)
    if known is not pool and place_of(known) != place_of(pool):  # a module that is run again registers the same anew
        raise ValueError(f"there is a pool {pool.__name__} of {place_of(known)} already; give yours another name")
    POOLS[pool.__name__] = pool
    return pool


def find_pool(name: Any, package: str | None = None) -> type[Pool]:
    """The pool that a folder names.

    Args:
        name: its class's name. package: the package that it was saved from, for the error's sake alone.

    Raises:
        ModuleNotFoundError: the package is named, and does not announce or register such a pool here.
        ValueError: no such pool.
    """
    if name not in POOLS and (found := announced(GROUP, str(name))) is not None:
        register_pool(found)
    if name in POOLS:
        return POOLS[name]
    if package:
        raise ModuleNotFoundError(absent("pool", str(name), package, GROUP), name=package)
    raise ValueError(f"there is no pool {name!r}; known: {', '.join(POOLS)}")


def announced(group: str, name: str) -> Any:
    """What an installed package announces as `name`, or None."""
    for entry in importlib.metadata.entry_points(group=group, name=name):
        return entry.load()
    return None


def absent(kind: str, name: str, package: str, group: str) -> str:
    """The message for a pool or design whose package is not here."""
    return (
        f"the {kind} {name!r} comes from the package {package!r}, which is not installed here or does not announce it; "
        f"install {package}, or import it before loading if it registers the {kind} itself (entry points: {group})"
    )


def place_of(pool: type[Pool]) -> str:
    return f"{pool.__module__}.{pool.__qualname__}"
