"""What every export shares: what is made compared with the embedder, and what cannot be exported."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..embedder.adapters import has_adapter
from ..embedder.embedder import Embedder


def agreement(embedder: Embedder, theirs: Tensor, embed: Callable[[], Tensor], failure: str) -> float:
    """The largest difference of a coordinate; RuntimeError (`failure`) where it is more than rounding.

    Args:
        theirs: embeddings [B, D] to be judged. embed: those of the embedder, see `Embedder.disagreement`.
    """
    error, limit = embedder.disagreement(embed(), theirs, embed)
    if not error <= limit:
        raise RuntimeError(f"{failure} by {error:.1e} (at most {limit:.1e} is rounding in {embedder.dtype})")
    return error


def check_mergeable(embedder: Embedder, what: str) -> None:
    if has_adapter(embedder[0].model):  # type: ignore[arg-type]
        raise ValueError(f"the {what} holds full weights, and this embedder has an adapter; call merge(embedder) first")
