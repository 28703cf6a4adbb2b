"""Trainable pooling of the last layer: cross-attention over its tokens (designs 2 and 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from mlpool_kernels.rows import unit_rows
from torch import Tensor

from . import checkpoints
from .base import check_choice, check_range, gather_tokens
from .layers import last_state
from .tokens import Tokens, select_tokens
from .trainable import PAPER, TrainablePool

TYPICAL_TOKENS = 512


class LastLayerPool(TrainablePool):
    """Learned latents attend over the last layer's states, padding masked (the released code pools it as text).

    Args:
        hidden_size: D. num_latents: R. num_heads: H. head_dim: d, of one head. ff_mult: feed-forward width over D.
        token_pooling: "last", the last token's state is the only key (design 2; the attention is then 1 and the query
            and key weights get zero gradients); "mean", every token is a key (design 4). With a residual it starts
            at EOS pooling with the first, at mean pooling with the second.
        residual: "mix", e ∝ w x + pooled - z̄, x the token's or the mean state at length √D, w a learned weight, 1 at
            the start; True, False as in `MultiLayerPool`.
        normalize, backend, choices, device, dtype: as in `MultiLayerPool`.

    Source: "Pooling And Attention" (arXiv 2409.02727), section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 16,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 1,
        token_pooling: str = "mean",
        residual: bool | str = "mix",
        normalize: bool = True,
        backend: str = "auto",
        choices: Mapping[str, str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("token_pooling", token_pooling, ("last", "mean"))  # its keys are the tokens themselves
        super().__init__(
            hidden_size, num_latents, num_heads, head_dim, ff_mult, token_pooling, residual, "last", normalize,
            backend, choices, None, False, device, dtype,
        )  # fmt: skip

    @classmethod
    def paper(cls, hidden_size: int, token_pooling: str = "mean", **options: Any) -> Self:
        """The released sizes: 768 latents, 32 heads of 2048, feed-forward 4·D, no residual, N(0,1) start."""
        return cls(hidden_size, token_pooling=token_pooling, **{**PAPER, **options})

    @classmethod
    def from_released(cls, path: str | Path, num_heads: int = 32, token_pooling: str = "mean", **options: Any) -> Self:
        """Load the authors' `attn_pool.pt` of design 2 or 4; see `MultiLayerPool.from_released`."""
        options["token_pooling"] = token_pooling
        return checkpoints.load_released(cls, path, num_heads, multi_layer=False, **options)

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed a batch.

        Args:
            hidden_states: the last hidden state [B, T, D] (packed [total, D] or [1, total, D] with `cu_seqlens`), or a
                sequence of states of which the last is taken.
            attention_mask, cu_seqlens, token_mask: as in `MultiLayerPool.forward`.
            output_attentions: also return the weights [B, H, R, n]; n is T, the longest text when packed, or 1.

        Returns: embedding [B, D].
        """
        state = last_state(hidden_states, self.hidden_size)
        tokens = select_tokens(
            state.shape, state.device, attention_mask, cu_seqlens, token_mask, backend=self.backend
        )  # fmt: skip
        home = self.latents.device
        one_key = self.token_pooling == "last"
        base = None
        if one_key or self.residual:
            base = gather_tokens([state], tokens, self.token_pooling, self.backend).to(home)
            check_range(base)
        if one_key:
            assert base is not None
            keys, key_mask = base, None
        else:
            keys, key_mask = (t.to(home) for t in _padded_keys(state, tokens))
            check_range(keys)
            # Its keys are the tokens; the mix is of their mean.
            base = unit_rows(base) if base is not None and self.mix_weights is not None else base
        mixes = one_key and self.mix_weights is not None
        product, y_mean, attention, _ = self._cross_attend([keys], None, key_mask, output_attentions, mixes)
        embedding = self._embed(product, y_mean, base, state.dtype, mixes)
        return embedding if attention is None else (embedding, attention)

    def _plan_keys(self, tokens: int | None) -> int:
        if self.token_pooling == "last":
            return 1
        return TYPICAL_TOKENS if tokens is None else tokens


def _padded_keys(state: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Keys [B, n, D], zeros where nothing is kept (what padding holds can reach nothing), and their mask [B, n]."""
    if not tokens.packed:
        assert tokens.keep is not None
        mask = tokens.keep.view(tokens.shape)
        return torch.where(mask[:, :, None], state, 0), mask
    flat = state.reshape(-1, state.shape[-1])
    length = int((tokens.ends - tokens.starts).max()) if tokens.longest is None else tokens.longest
    row = tokens.starts[:, None] + torch.arange(length, device=state.device)
    mask = row < tokens.ends[:, None]
    row = torch.where(mask, row, 0)
    if tokens.keep is not None:
        mask = mask & tokens.keep[row]
    return torch.where(mask[:, :, None], flat[row], 0), mask
