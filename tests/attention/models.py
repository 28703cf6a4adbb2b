"""Tiny random models of each family, and batches for them; shared by the tests of this folder.

There is no conftest.py here: the other folders' tests import from `conftest` and would get this one. A test module
takes the fixture by name, `flex_uncompiled = models.flex_uncompiled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn

V, D, L = 64, 32, 3
# flex attention wants a head dimension that is a power of two, 16 at least
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "pad_token_id": 0}
GATED = {
    **COMMON,
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {**GATED, "head_dim": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**COMMON, "intermediate_size": 48, "max_position_embeddings": 66, **NO_DROPOUT}
GPT2_SIZES = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
FALCON = {**COMMON, "ffn_hidden_size": 48, "max_position_embeddings": 64}
SLIDING = ["sliding_attention"] * 2 + ["full_attention"]

# name → (class prefix, config)
DECODERS: dict[str, tuple[str, dict]] = {
    "Llama": ("Llama", GATED),
    "Mistral": ("Mistral", HEAD),
    "Qwen2": ("Qwen2", GATED),
    "Qwen3": ("Qwen3", HEAD),
    "Phi3": ("Phi3", GATED),
    "Gemma2": ("Gemma2", {**HEAD, "query_pre_attn_scalar": 16, "layer_types": SLIDING, "sliding_window": 40}),
    "Gemma3": ("Gemma3Text", {**HEAD, "query_pre_attn_scalar": 16, "layer_types": SLIDING, "sliding_window": 40}),
    "OLMo2": ("Olmo2", GATED),
    "Granite": ("Granite", GATED),
    "GPT-NeoX": ("GPTNeoX", {**COMMON, "intermediate_size": 48, "max_position_embeddings": 64}),
    "StableLM": ("StableLm", GATED),
    "OPT": ("OPT", {**COMMON, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": D, "dropout": 0.0}),
    "GPT-2": ("GPT2", {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "Falcon": ("Falcon", FALCON),
}
ENCODERS: dict[str, tuple[str, dict]] = {
    "BERT": ("Bert", ENCODER),
    "RoBERTa": ("Roberta", ENCODER),
    "XLM-R": ("XLMRoberta", ENCODER),
    "ModernBERT": ("ModernBert", {**GATED, "global_attn_every_n_layers": 2, "local_attention": 40}),
}
# the same, with a window shorter than the texts of `texts()`
WINDOWED: dict[str, tuple[str, dict]] = {
    "Mistral": ("Mistral", {**HEAD, "sliding_window": 4}),
    "Phi3": ("Phi3", {**GATED, "sliding_window": 4}),
    "Qwen2": ("Qwen2", {**GATED, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING}),
    "Qwen3": ("Qwen3", {**HEAD, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING}),
    "Gemma2": ("Gemma2", {**DECODERS["Gemma2"][1], "sliding_window": 4}),
    "Gemma3": ("Gemma3Text", {**DECODERS["Gemma3"][1], "sliding_window": 4}),
}
# what the library itself refuses or has no code for
REFUSED = {("Gemma2", "sdpa"), *((name, "flex_attention") for name in ("StableLM", "GPT-2", "Falcon"))}


def build(
    name: str,
    backend: str = "eager",
    head: str = "Model",
    among: dict[str, tuple[str, dict]] | None = None,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> nn.Module:
    """A tiny random model in which no parameter is zero, in eval mode."""
    torch.manual_seed(0)
    prefix, settings = (among or {**DECODERS, **ENCODERS})[name]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    config._attn_implementation = backend
    model = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def texts(lengths: Sequence[int] = (9, 6, 3), seed: int = 1) -> list[Tensor]:
    """Random token ids, one [n] int64 tensor for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator) for n in lengths]


def pad(rows: Sequence[Tensor], side: str = "right") -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T] of these texts, padded on one side ("mixed": every second text left)."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        left = side == "left" or (side == "mixed" and i % 2 == 1)
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(row: Tensor) -> dict[str, Tensor]:
    """The batch of one text, without padding."""
    return pad([row])


@pytest.fixture
def flex_uncompiled() -> Iterator[None]:
    """flex_attention computed step by step: compiling it takes half a minute on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield
