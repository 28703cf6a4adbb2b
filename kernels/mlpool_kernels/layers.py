"""Layers in whose place `kernelize` of Hugging Face's `kernels` puts this package: plain torch there, its ops here.

As that library asks, a layer has no constructor, no state and no method but `forward`: what it reads are the parameters
of the module whose `forward` it replaces, named below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .chunk import Weights
from .fold import fold_queries, fold_values
from .gather import gather
from .plan import Plan, Sizes, choose
from .pool import pool
from .runtime import device_memory, use_triton


class MaskedMean(nn.Module):
    """The mean over a text's tokens, as a model pools its last hidden state; padding is never read."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden_states [B, T, D], attention_mask [B, T] of 0 and 1, a token in every text -> [B, D], of that dtype.

        Sums are of float32 at least. Differentiable in hidden_states.
        """
        batch, length = attention_mask.shape
        keep = attention_mask != 0
        starts = torch.arange(batch, device=keep.device) * length
        last = starts + (keep * torch.arange(length, device=keep.device)).amax(1)
        rows = gather(
            [hidden_states], starts, starts + length, last, keep.sum(1), keep.flatten().contiguous(), mean=True
        )
        return rows[:, 0]


class CrossAttentionPool(nn.Module):
    """The trainable pooler of arXiv 2409.02727, 3.3, up to the mean over its latents.

    The module whose forward this replaces has, of one dtype and device, the parameters that `reference.cross_attention`
    lists, and `num_heads`; it adds layer weights itself, before.
    """

    num_heads: int
    latents: Tensor
    key_norm_weight: Tensor
    key_norm_bias: Tensor
    latent_norm_weight: Tensor
    latent_norm_bias: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value_weight: Tensor
    output_weight: Tensor
    ff_norm_weight: Tensor
    ff_norm_bias: Tensor
    ff_in_weight: Tensor
    ff_in_bias: Tensor
    ff_out_weight: Tensor
    ff_out_bias: Tensor

    def forward(self, states: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """X0 [B, n, D], key_mask bool [B, n], False for padding -> [B, D] of the states' dtype.

        Differentiable in states and parameters; those of the queries get no gradient of one key (n = 1), whose
        attention is 1.
        """
        weights, plan = _weights(self, states, key_mask is not None)
        pooled, _, _ = pool(
            [states], None, key_mask, weights, self.ff_out_weight, self.ff_out_bias, self.num_heads, plan
        )
        return pooled.to(states.dtype)


def _weights(p: CrossAttentionPool, states: Tensor, masked: bool) -> tuple[Weights, Plan]:
    """The parameters in the forms of the cheapest plan, folded at every call: a layer keeps no state."""
    batch, keys, hidden = states.shape
    latents, inner = p.latents.shape[0], p.query_weight.shape[0]
    sizes = Sizes(batch, keys, hidden, latents, p.num_heads, inner // p.num_heads, p.ff_out_weight.shape[1])
    plan = choose(
        sizes, training=torch.is_grad_enabled() and any(t.requires_grad for t in (states, *p.parameters())),
        cached=False, triton=use_triton("auto", states, p.latents), itemsize=p.latents.dtype.itemsize,
        memory_bytes=device_memory(states.device), masked=masked,
    )  # fmt: skip
    value, output = p.value_weight, p.output_weight
    key = None if plan.keys == "absorbed" or keys == 1 else p.key_weight
    queries = None
    if keys > 1:
        folded = p.key_weight if plan.keys == "absorbed" else None
        queries = fold_queries(
            p.latents, p.latent_norm_weight, p.latent_norm_bias, p.query_weight, folded, p.num_heads
        )  # fmt: skip
    late = plan.values != "absorbed"
    weights = Weights(
        None, p.key_norm_weight, p.key_norm_bias, queries, key,
        value if late else fold_values(value, output, p.num_heads), output if late else None, p.latents,
        p.ff_norm_weight, p.ff_norm_bias, p.ff_in_weight, p.ff_in_bias,
    )  # fmt: skip
    return weights, plan
