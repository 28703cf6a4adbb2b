"""What every export shares: settings for the reader, what is made compared with the embedder, what is refused."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..embedder.adapters import has_adapter
from ..embedder.backbone import Backbone
from ..embedder.embedder import _PROBES, Embedder
from ..quantized import is_quantized
from ..version import __version__

SETTINGS = "embedder.json"  # the file of `settings`


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
    if is_quantized(embedder[0]):
        raise ValueError(
            f"the {what} holds weights as numbers, and this embedder's are quantised; call dequantize(embedder) first "
            "(--dequantize)"
        )


def settings(embedder: Embedder) -> dict[str, Any]:
    """What a reader without mlpool has to know."""
    backbone: Any = embedder[0]
    kept = ("design", "max_seq_length", "append_eos", "include_prompt", "include_bos")
    return {
        "mlpool": __version__, **{name: getattr(backbone, name) for name in kept}, "prompts": embedder.prompts,
        "frame": {"before": backbone.texts.prefix, "behind": backbone.texts.suffix},
        "default_prompt_name": embedder.default_prompt_name, "dimension": embedder.get_embedding_dimension(),
        "vocabulary": backbone.model.get_input_embeddings().weight.shape[0],
    }  # fmt: skip


def compare_tokens(backbone: Backbone, tokenize: Callable[[list[str]], list[list[int]]]) -> None:
    """RuntimeError where a written tokenizer gives other ids than the backbone's, also where a text is cut."""
    limit = backbone.max_seq_length
    probes = [*_PROBES, *(["word " * (limit + 1)] if limit is not None else [])]
    ours = [ids.tolist() for ids in backbone.token_ids(probes).ids]
    for probe, mine, other in zip(probes, ours, tokenize(probes), strict=True):
        if mine != other:
            raise RuntimeError(
                f"not exported: the saved tokenizer gives other tokens for {probe[:40]!r}: {other[:5]} … {other[-3:]}, "
                f"expected {mine[:5]} … {mine[-3:]}"
            )
