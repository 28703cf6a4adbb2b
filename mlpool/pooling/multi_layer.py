"""Multi-Layers Trainable Pooling: cross-attention over one row of every layer (designs 3 and 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from mlpool_kernels.gather import one_launch
from mlpool_kernels.runtime import use_triton
from torch import Tensor

from . import checkpoints
from .base import check_positive, check_range, check_token_pooling, gather_tokens, log_once
from .layers import read_layer_states, read_layers, select_layers
from .tokens import Check, require, select_tokens
from .trainable import PAPER, TrainablePool


class MultiLayerPool(TrainablePool):
    """Learned latents attend over the last token's state, or the tokens' mean, of every layer.

    The default is small (at most 1 % of backbones such as Qwen2-0.5B or Mistral-7B). It brings every row of X0 to the
    length √D and stands on a learned mix of the layers, the cross-attention beside it: e ∝ Σ_l w_l x_l + pooled - z̄,
    z̄ the mean of the latents. It starts exactly at the mix `start`, such as EOS or mean pooling of the last layer, and
    its first step moves it: what is zero there are the matrices that end the branch. `MultiLayerPool.paper` is the
    paper's.

    Args:
        hidden_size: D. num_layers: L, the embedding not counted.
        num_latents: R. num_heads: H. head_dim: d, of one head. ff_mult: feed-forward width over D.
        layers: indices of the layers to read, increasing; None for all.
        token_pooling: "last" (causal models), "mean" (bidirectional ones) or "unit_mean", whose rows have a norm of at
            most 1: without residual="mix" the norm's eps, 1e-5, is no longer small beside their variance, at most 1/D.
        residual: "mix", as above; True, e ∝ X0[:, -1] + gate ⊙ pooled of raw rows, the gate zero at the start, which
            was the default before; False, the pooled alone, as released. normalize: unit length.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        choices: overrides of the cost model, e.g. {"memory": "recompute"}; see `mlpool_kernels.plan`.
        skip_tokens: first tokens of each text to leave out of a mean of hidden states; see `mlpool.gather`.
        start: of the mix: the "last" layer read alone, "all" evenly, or one weight for each layer read.
        whiten: a matrix over the embedding before unit length, the identity until `calibrate`; see `whitening.py`.
        device, dtype: of the parameters.

    Source: "Pooling And Attention" (arXiv 2409.02727), section 3.3.
    """

    older: ClassVar = {"whiten": False}
    reads_all_layers = True

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_latents: int = 16,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 1,
        layers: Sequence[int] | None = None,
        token_pooling: str = "last",
        residual: bool | str = "mix",
        normalize: bool = True,
        backend: str = "auto",
        choices: Mapping[str, str] | None = None,
        skip_tokens: int = 0,
        start: str | Sequence[float] = "last",
        whiten: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(num_layers=num_layers)
        check_token_pooling(token_pooling, skip_tokens)
        selected = select_layers(layers, num_layers)
        super().__init__(
            hidden_size, num_latents, num_heads, head_dim, ff_mult, token_pooling, residual, start, normalize,
            backend, choices, num_layers if selected is None else len(selected), whiten, device, dtype,
        )  # fmt: skip
        self.num_layers, self.layers, self.skip_tokens, self.whiten = num_layers, selected, skip_tokens, whiten

    @classmethod
    def paper(cls, hidden_size: int, num_layers: int, token_pooling: str = "last", **options: Any) -> Self:
        """The released sizes: 768 latents, 32 heads of 2048, feed-forward 4·D, no residual, N(0,1) start."""
        return cls(hidden_size, num_layers, token_pooling=token_pooling, **{**PAPER, **options})

    @classmethod
    def from_released(cls, path: str | Path, num_heads: int = 32, token_pooling: str = "last", **options: Any) -> Self:
        """Load the authors' `attn_pool.pt` (read with weights_only=True); all sizes but the heads come from the file.

        Args:
            options: of the pool; num_layers for a base model of fewer layers than the file has rows (theirs has 32
                always, of which the first are read).

        Raises:
            FileNotFoundError; ValueError for a file that is cut short or holds anything but plain tensors, and for
            missing, extra or misshapen keys, named.
        """
        options["token_pooling"] = token_pooling
        return checkpoints.load_released(cls, path, num_heads, multi_layer=True, **options)

    def forward(
        self,
        hidden_states: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
        layer_states: Tensor | None = None,
        includes_embedding: bool = True,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed a batch.

        Args:
            hidden_states: the L+1 tensors [B, T, D] that transformers returns, the embedding first; exactly the L
                layers with includes_embedding=False. Packed: [total, D] or [1, total, D] with `cu_seqlens`.
            attention_mask, cu_seqlens, token_mask: see `mlpool.gather`.
            layer_states: X0 [B, L, D] instead of hidden_states, gathered already (by `mlpool.taps`).
            output_attentions: also return the attention weights [B, H, R, L].

        Returns: embedding [B, D], of the wider of the states' and the compute dtype.

        Raises:
            ValueError, TypeError: a wrong number of layers, mixed shapes or dtypes, masks and offsets that do not fit,
            a text without a token (its row is named).
        """
        checks: Sequence[Check] = ()
        if layer_states is not None:
            states, rows = [read_layer_states(self, hidden_states, layer_states)], None
        else:
            layers = read_layers(self, hidden_states, includes_embedding)
            states, rows, checks = self._gather(layers, attention_mask, cu_seqlens, token_mask)
        if rows is None:
            check_range(states[0])
        mixes = self.mix_weights is not None
        product, y_mean, attention, x0 = self._cross_attend(states, rows, None, output_attentions, mixes)
        embedding = self._embed(product, y_mean, states[0] if x0 is None else x0, states[0].dtype, mixes)
        require(checks)
        return embedding if attention is None else (embedding, attention)

    def _gather(
        self, layers: list[Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None, token_mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Sequence[Check]]:
        """X0, or the layers and their rows where the pool's own kernel is to gather them; and what is still to check.

        The host waits for a GPU when all is launched, behind the embedding: its own time then passes beside the
        backbone's.
        """
        tokens = select_tokens(
            layers[0].shape, layers[-1].device, attention_mask, cu_seqlens, token_mask, check=False,
            skip_tokens=self.skip_tokens, backend=self.backend,
        )  # fmt: skip
        checks, home = tokens.checks, self.latents.device
        if not all(check.fine.is_cuda for check in checks):
            require(checks)
            checks = ()
        fused = self.token_pooling == "last" and use_triton(self.backend, self.latents, layers[0]) and len(layers) > 1
        if fused and layers[0].device == home and one_launch(layers):
            return layers, tokens.last, checks
        x0 = gather_tokens(layers, tokens, self.token_pooling, self.backend)
        if x0.device != home:
            log_once(f"the last layer is on {x0.device}, the pool on {home}: its rows are copied for every batch")
        return [x0.to(home)], None, checks

    def _plan_keys(self, tokens: int | None) -> int:
        return self.num_layers if self.layers is None else len(self.layers)
