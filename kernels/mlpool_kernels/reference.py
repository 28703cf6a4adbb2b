"""The paper's equations in plain eager PyTorch, step by step as the released module computes them.

Nothing here is fast and nothing else in the package uses it: tests and benchmarks compare with it.
Source: "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?" (arXiv 2409.02727),
section 3, and its released module.

Parameters come as a mapping with the names of `mlpool.MultiLayerPool`:

    latents [R,D]                     Z            layer_weights [L,D]               E  (multi-layer only)
    key_norm_weight/bias [D]          LN1          latent_norm_weight/bias [D]       LN2
    query_weight, key_weight, value_weight [I,D]   output_weight [D,I]               Wq, Wk, Wv, Wo
    ff_norm_weight/bias [D]           LN3          ff_in_weight [2F,D], ff_in_bias [2F]   W1, b1
    ff_out_weight [D,F], ff_out_bias [D]  W2, b2   gate [D], mix_weights [L]         of a residual form
    whitening [D,D]                   W of a pool that whitens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


def gather(hidden_states: Sequence[Tensor], attention_mask: Tensor, token_pooling: str = "last") -> Tensor:
    """X0: the last token's state, or the masked mean over tokens, of every layer.

    Args:
        hidden_states: L tensors [B, T, D], the embedding left out.
        attention_mask: [B, T] of 0 and 1.
        token_pooling: "last", "mean" or "unit_mean", of tokens of unit length (zero stays zero; not the paper's).

    Returns: [B, L, D] of the hidden states' dtype.
    """
    stacked = torch.stack(list(hidden_states), dim=1)
    mask = attention_mask != 0
    if token_pooling == "last":
        position = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, position, -1).amax(1)
        return stacked[torch.arange(len(last), device=last.device), :, last]
    if token_pooling == "unit_mean":
        length = stacked.norm(dim=-1, keepdim=True)
        stacked = stacked * (length != 0) / length.masked_fill(length == 0, 1)
    weights = mask[:, None, :, None].to(stacked.dtype)
    return (stacked * weights).sum(2) / weights.sum(2)


def cross_attention(
    states: Tensor,
    parameters: Mapping[str, Tensor],
    num_heads: int,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The trainable pooler over n keys per text: attention of the latents, feed-forward, mean over latents.

    Args:
        states: X0 [B, n, D], layers or tokens.
        parameters: the mapping described above; `layer_weights` is added where present.
        num_heads: H; the head size is I / H.
        key_mask: [B, n], False for keys that are padding.

    Returns: mean over latents of Y' [B, D], not normalised, and the attention weights [B, H, R, n].
    """
    p = parameters
    batch, latents = states.shape[0], p["latents"]
    if "layer_weights" in p:
        states = states + p["layer_weights"]
    hidden = latents.shape[1:]
    keys_in = F.layer_norm(states, hidden, p["key_norm_weight"], p["key_norm_bias"], NORM_EPS)
    # As released: the latents are repeated for every text before they are normed and projected.
    z = latents.expand(batch, -1, -1)
    queries_in = F.layer_norm(z, hidden, p["latent_norm_weight"], p["latent_norm_bias"], NORM_EPS)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q = heads(queries_in @ p["query_weight"].T)
    k, v = (keys_in @ torch.cat([p["key_weight"], p["value_weight"]]).T).chunk(2, dim=-1)
    scores = q @ heads(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    attention = scores.softmax(-1)
    mixed = (attention @ heads(v)).transpose(1, 2).flatten(2)
    y = mixed @ p["output_weight"].T + z

    normed = F.layer_norm(y, hidden, p["ff_norm_weight"], p["ff_norm_bias"], NORM_EPS)
    a, g = (normed @ p["ff_in_weight"].T + p["ff_in_bias"]).chunk(2, dim=-1)
    y = (a * F.gelu(g)) @ p["ff_out_weight"].T + p["ff_out_bias"] + y
    return y.mean(1), attention


def multi_layer_pool(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor,
    parameters: Mapping[str, Tensor],
    num_heads: int,
    token_pooling: str = "last",
) -> Tensor:
    """Multi-Layers Trainable Pooling (designs 3 and 5): L tensors [B, T, D] -> unit embedding [B, D].

    With a `gate` among the parameters the gated residual: e ∝ x_L + gate ⊙ pooled. With `mix_weights` the rows are
    brought to length √D first, and e ∝ v = Σ_l w_l x_l + pooled - mean(Z); with `whitening`, W v.
    """
    x0 = rows(gather(hidden_states, attention_mask, token_pooling), parameters)
    pooled, _ = cross_attention(x0, parameters, num_heads)
    return _finish(pooled, x0, parameters)


def last_layer_pool(
    hidden_state: Tensor,
    attention_mask: Tensor,
    parameters: Mapping[str, Tensor],
    num_heads: int,
    token_pooling: str = "mean",
) -> Tensor:
    """Trainable pooling of the last layer: design 2 ("last": one key) and design 4 ("mean": every token a key).

    Args:
        hidden_state: [B, T, D].
        attention_mask: [B, T]. Padding is masked, which the released code does not do.
    """
    base = rows(gather([hidden_state], attention_mask, token_pooling), parameters)
    if token_pooling == "last":
        pooled, _ = cross_attention(base, parameters, num_heads)
    else:
        pooled, _ = cross_attention(hidden_state, parameters, num_heads, attention_mask != 0)
    return _finish(pooled, base, parameters)


def rows(x0: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """What a pool with these parameters reads of X0 [B, L, D]."""
    return F.normalize(x0, dim=-1) * x0.shape[-1] ** 0.5 if "mix_weights" in parameters else x0


def _finish(pooled: Tensor, x0: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    if "gate" in parameters:
        pooled = x0[:, -1] + parameters["gate"] * pooled
    if "mix_weights" in parameters:
        pooled = torch.einsum("l,bld->bd", parameters["mix_weights"], x0) + pooled - parameters["latents"].mean(0)
    if "whitening" in parameters:
        pooled = pooled @ parameters["whitening"].T
    return F.normalize(pooled, dim=-1)
