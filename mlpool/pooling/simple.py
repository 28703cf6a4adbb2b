"""Pools without cross-attention: the last token, the mean, and one weight a layer."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from mlpool_kernels.rows import mix_rows
from torch import Tensor, nn

from .base import Pool, check_choice, check_flags, check_positive, check_token_pooling, gather
from .layers import last_state, read_layer_states, read_layers, select_layers
from .mix import fill_start, start_weights, unit_rows

LEARNING_RATES = {"": 3e-2}  # of a unit mix: one number a layer moves far


class _LastLayer(Pool):
    trainable = False
    token_pooling: str
    skip_tokens = 0

    def __init__(self, hidden_size: int | None = None, normalize: bool = True, backend: str = "auto") -> None:
        super().__init__()
        if hidden_size is not None:
            check_positive(hidden_size=hidden_size)
        check_flags(normalize=normalize)
        self.hidden_size, self.normalize, self.backend = hidden_size, normalize, backend

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Last hidden state [B, T, D] (or a tuple of states, of which the last counts) -> embedding [B, D].

        attention_mask, cu_seqlens, token_mask and the errors: see `mlpool.gather`.
        """
        state = last_state(hidden_states, self.hidden_size)
        rows = gather(
            [state], attention_mask, token_pooling=self.token_pooling, token_mask=token_mask, cu_seqlens=cu_seqlens,
            skip_tokens=self.skip_tokens, backend=self.backend,
        )  # fmt: skip
        return self._finish(rows[:, 0])


class EosPool(_LastLayer):
    """The last token's state of the last layer (design 1 of arXiv 2409.02727).

    Args:
        hidden_size: D, checked where given. normalize: unit length. backend: "auto", "triton" or "torch".
    """

    token_pooling = "last"


class MeanPool(_LastLayer):
    """The masked mean over tokens of the last layer's states; padding is never read.

    Args:
        hidden_size: D, checked where given. normalize: unit length. backend: "auto", "triton" or "torch".
        token_pooling: "mean" or "unit_mean". skip_tokens: first tokens of each text to leave out; see `mlpool.gather`.
    """

    def __init__(
        self,
        hidden_size: int | None = None,
        normalize: bool = True,
        backend: str = "auto",
        token_pooling: str = "mean",
        skip_tokens: int = 0,
    ) -> None:
        super().__init__(hidden_size, normalize, backend)
        check_token_pooling(token_pooling, skip_tokens)
        if token_pooling == "last":
            raise ValueError('MeanPool takes token_pooling "mean" or "unit_mean", got "last"; that is EosPool')
        self.token_pooling, self.skip_tokens = token_pooling, skip_tokens


class LayerWeightsPool(Pool):
    """One weight a layer: e = Σ_l w_l √D X0_l / |X0_l|, over the gathered rows of all layers.

    The control that asks how much of multi-layer pooling a single weight per layer explains.

    Args:
        hidden_size: D. num_layers: L. layers: indices of the layers to use, increasing; None for all.
        token_pooling: "last", "mean" or "unit_mean". normalize: unit length. backend: "auto", "triton" or "torch".
        skip_tokens: first tokens of each text to leave out of a mean; see `mlpool.gather`.
        mix: "unit", as above; "softmax", e = γ Σ_l softmax(w)_l X0_l of the rows as they are, the scalar mix of ELMo
            (arXiv 1802.05365), which starts at their plain average.
        start: of the unit mix: "all" layers evenly, the "last" alone, or one weight for each layer read.
    """

    older: ClassVar = {"mix": "softmax"}
    reads_all_layers = True

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        layers: Sequence[int] | None = None,
        token_pooling: str = "last",
        normalize: bool = True,
        backend: str = "auto",
        skip_tokens: int = 0,
        mix: str = "unit",
        start: str | Sequence[float] = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, num_layers=num_layers)
        check_choice("mix", mix, ("unit", "softmax"))
        check_token_pooling(token_pooling, skip_tokens)
        check_flags(normalize=normalize)
        self.hidden_size, self.num_layers, self.normalize = hidden_size, num_layers, normalize
        self.layers = select_layers(layers, num_layers)
        self.token_pooling, self.skip_tokens, self.backend, self.mix = token_pooling, skip_tokens, backend, mix
        count = num_layers if self.layers is None else len(self.layers)
        self.start = start if isinstance(start, str) else start_weights(start, count)
        if mix == "softmax" and start != "all":
            raise ValueError(f'start={start!r} is for mix="unit"; a softmax mix starts at the plain average')
        self.weights = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))
        # One entry, not a scalar: FSDP2 cannot shard a tensor without dimensions.
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if mix == "softmax" else None
        if mix == "unit":
            fill_start(self.weights, start)
            self.learning_rates = LEARNING_RATES

    def shares(self) -> Tensor:
        """[L]: the factor of each layer's row."""
        return self.weights if self.scale is None else self.scale * self.weights.softmax(0)

    def _rows(self, x0: Tensor) -> Tensor:
        return unit_rows(x0) if self.scale is None else x0

    def forward(
        self,
        hidden_states: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
        layer_states: Tensor | None = None,
        includes_embedding: bool = True,
    ) -> Tensor:
        """As `MultiLayerPool.forward`: hidden states with a mask, or layer_states [B, L, D] -> embedding [B, D]."""
        if layer_states is not None:
            x0 = read_layer_states(self, hidden_states, layer_states)
        else:
            states = read_layers(self, hidden_states, includes_embedding)
            x0 = gather(
                states, attention_mask, token_pooling=self.token_pooling, token_mask=token_mask,
                cu_seqlens=cu_seqlens, skip_tokens=self.skip_tokens, backend=self.backend,
            )  # fmt: skip
        mixed = mix_rows(self.shares(), self._rows(x0))
        return self._finish(mixed.to(torch.promote_types(x0.dtype, self.weights.dtype)))
