"""A model tried before and after it is packed: two short texts, which must come out alike."""

from typing import Any

import torch
from torch import Tensor, nn

from ..trunk import family_name, no_cache
from .families import backend_of
from .probe import AttentionCheckError, device_of, error_of, ordinary_tokens, precision_of, require_weights, undisturbed

# Relative, over all layers: above rounding, below what another position or one foreign token makes.
_LIMITS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def try_packed(trunk: nn.Module) -> list[Tensor]:
    """`_probe`, whose error says that the model cannot run packed: found now, not when it encodes."""
    try:
        return _probe(trunk)
    except (AttentionCheckError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ours, or one from code of the family's own that takes the row for one text
        raise ValueError(
            f"{family_name(trunk)} cannot run packed: a trial of two short texts failed on {backend_of(trunk.config)} "
            f"({type(error).__name__}: {error})"
        ) from error


def _probe(trunk: Any) -> list[Tensor]:
    """Last hidden states of two short texts, run as one right-padded batch."""
    require_weights(trunk)
    text, device = ordinary_tokens(trunk, 16, torch.Generator().manual_seed(0)), device_of(trunk)
    lengths, pad = (8, 5), getattr(trunk.config, "pad_token_id", None)
    ids = torch.full((2, 8), pad if isinstance(pad, int) and pad >= 0 else 0)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, :n], mask[row, :n] = text[8 * row : 8 * row + n], 1
    with undisturbed(trunk):
        output = trunk(input_ids=ids.to(device), attention_mask=mask.to(device), **no_cache(trunk))
    hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return [hidden[row, :n] for row, n in enumerate(lengths)]


def compare(trunk: nn.Module, got: list[Tensor], expected: list[Tensor], backend: str) -> None:
    limit = _LIMITS[precision_of(got[0])]
    errors = [error_of(one, other, other) for one, other in zip(got, expected, strict=True)]
    if not all(error <= limit for error in errors):  # or NaN
        listed = ", ".join(f"{error:.1e}" for error in errors)
        raise AttentionCheckError(
            f"{family_name(trunk)} gives other hidden states packed than padded on {backend}: relative errors {listed} "
            f"(at most {limit:.0e} is rounding); the model was left unpacked"
        )
