"""Bidirectional attention on decoder models, its self-test, and packed execution without padding."""

from typing import TYPE_CHECKING, Any

# Not lazy: a module and a class share the name `bidirectional`, and whichever is imported last has it. It is cheap,
# since transformers is imported where it is used.
from .bidirectional import bidirectional, causal, is_bidirectional
from .check import AttentionCheckError, AttentionReport, check_attention

if TYPE_CHECKING:
    from .packed import pack, unpack

__all__ = [
    "AttentionCheckError", "AttentionReport", "bidirectional", "causal", "check_attention", "is_bidirectional",
    "pack", "unpack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in ("pack", "unpack"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import packed

    return getattr(packed, name)
