"""Tiny random models of many families to tap, batches, and what `output_hidden_states=True` gives of them."""

import torch
import transformers
from torch import nn

V, D, L, T = 40, 16, 3, 6
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "pad_token_id": 0}
GATED = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {**GATED, "head_dim": 8}
SLIDING = {**HEAD, "sliding_window": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_SIZES = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 32}
OPT_SIZES = {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": D, "dropout": 0.0}
BERT_SIZES = {**COMMON, "intermediate_size": 24, "max_position_embeddings": 32, **NO_DROPOUT}
FAMILIES = {
    "Llama": GATED,
    "Mistral": SLIDING,
    "Qwen2": GATED,
    "Qwen3": HEAD,
    "Gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3Text": {
        **SLIDING,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "GPT2": {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {**COMMON, **OPT_SIZES},
    "GPTNeoX": {**COMMON, "intermediate_size": 24},
    "Falcon": {**COMMON, "ffn_hidden_size": 24},
    "Phi3": GATED,
    "Bert": BERT_SIZES,
    "XLMRoberta": BERT_SIZES,
    "ModernBert": {**GATED, "max_position_embeddings": 32, "global_attn_every_n_layers": 2, "local_attention": 4},
}


def build(family: str, head: str = "Model", **changes) -> nn.Module:
    """A tiny random model in which no parameter is zero, in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(padding: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, T, dtype=torch.long)
    for row, missing in ((0, 2), (2, 4)):
        mask[row, T - missing :] = 0
    if padding == "left":
        mask = mask.flip(1)
    if padding == "mixed":
        mask[2] = mask[2].flip(0)
    ids = torch.randint(3, V, (3, T), generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def expected(hidden_states, how: str, mask: torch.Tensor) -> torch.Tensor:
    """layer_states [B, L, D] the eager way."""
    rows = torch.arange(mask.shape[0])
    last = torch.where(mask.bool(), torch.arange(mask.shape[1]), -1).amax(1)
    weight = (mask.double() / mask.sum(1, keepdim=True)).unsqueeze(2)
    if how == "unit_mean":
        hidden_states = [nn.functional.normalize(h, dim=-1) for h in hidden_states]
    picked = [h[rows, last] if how == "last" else (h * weight).sum(1).to(h.dtype) for h in hidden_states[1:]]
    return torch.stack(picked, 1)


def close(actual, wanted, tolerance: float = 1e-5):
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    error = (actual - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def embed(model: nn.Module, inputs: dict) -> dict:
    """The same call by inputs_embeds, a leaf with a gradient."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def gradients(model: nn.Module, inputs: dict, states: torch.Tensor, also: torch.Tensor | None = None) -> dict:
    """Gradients of a random linear function of layer_states (plus one of `also`), by name."""
    generator = torch.Generator().manual_seed(2)
    loss = (states * torch.randn(states.shape, generator=generator)).sum()
    if also is not None:
        loss = loss + (also * torch.randn(also.shape, generator=generator)).sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found["inputs_embeds"] = inputs["inputs_embeds"].grad.clone()
    inputs["inputs_embeds"].grad = None
    return found


def same_gradients(actual: dict, wanted: dict):
    assert actual.keys() == wanted.keys()
    scale = max(g.norm() for g in wanted.values())
    for name, grad in wanted.items():  # key biases have no true gradient, only rounding
        assert (actual[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name


def classes(model: nn.Module) -> list:
    """What detach has to restore: every module's class and instance attributes."""
    ours = ("_output_capturing_hooks_installed",)  # the library's own note, set by output_hidden_states=True
    return [(type(m), sorted(k for k in m.__dict__ if k not in ours)) for m in model.modules()]
