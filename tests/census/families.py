"""Every text family of the installed transformers as a tiny random model, its config shrunk by rules on names.

A config class is read for its arguments; what is an integer by default is set by the first rule that its name fits.
What no rule makes consistent (sizes that must be products of each other) stands in `EXCEPTIONS`. Models are random,
with no parameter zero, in float32 on a CPU.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, LAYERS = 128, 32, 2, 16, 4
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# name of an argument → its size; the first that matches
RULES: list[tuple[str, int]] = [
    (r".*vocab_size.*|.*_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|encoder_layers|depth", LAYERS),
    (r".*_layers", 2),
    (r".*(num_key_value_heads|num_kv_heads|kv_heads|num_query_groups|multi_query_group_num)", 1),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 4),
    (r"index_n_heads|.*attention_heads|.*num_heads|n_heads?|.*_heads", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"head_dim|d_head|d_kv|dim_head|.*_head_dim|mamba_d_head|mamba_headdim", HEAD_WIDTH),
    (r".*(intermediate_size|ffn_dim|ffn_size|d_ff|dff|dim_ff|d_inner|n_inner|hidden_dim|ffn_hidden_size)", 64),
    (r".*(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_2d_position_embeddings|max_source_positions)", 128),
    (r".*lora_rank|.*_rank", 16),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    (r".*(experts_per_tok|top_k_experts|moe_topk|moe_k|experts_top_k)", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"(mamba_)?chunk_size", 8),
    (r"sliding_window|index_topk|.*window_size|attention_chunk_size|local_attention|attention_window", 64),
    (r".*image_size", 32),
    (r".*patch_size", 8),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|width|projection_dim|emb_dim)|dim|.*_dim", WIDTH),
]  # fmt: skip
LARGE = 128  # integers above it that no rule knows are widths of towers


def families() -> list[str]:
    """model_type of every bare model that takes input_ids, and the variants; wrappers around a text model last."""
    known = [name for name in MODEL_MAPPING_NAMES if (cls := model_class(name)) is not None and _reads_text(cls)]
    return sorted([*known, *VARIANTS], key=lambda name: (_is_wrapper(name), name))


def model_class(name: str) -> type | None:
    """The class that AutoModel builds for a model_type, or None where this installation lacks what it needs."""
    names = MODEL_MAPPING_NAMES[name]
    try:
        return getattr(transformers, names if isinstance(names, str) else names[0])
    except (AttributeError, ImportError):
        return None


def _is_wrapper(name: str) -> bool:
    return bool(transformers.CONFIG_MAPPING[VARIANTS.get(name, (name,))[0]].sub_configs)


def _reads_text(cls: type) -> bool:
    try:
        return "input_ids" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    except ImportError:  # a dummy for a package that is missing
        return False


def build(name: str, backend: str = "eager", seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny random model of a family, in evaluation mode.

    Raises: what the library raises where the rules and exceptions do not fit the family, or it lacks the backend.
    """
    torch.manual_seed(seed)
    name, changes = (VARIANTS[name][0], {**VARIANTS[name][1], **changes}) if name in VARIANTS else (name, changes)
    config = tiny_config(transformers.CONFIG_MAPPING[name], **{**EXCEPTIONS.get(name, {}), **changes})
    config._attn_implementation = backend
    cls: Any = model_class(name)
    model = cls._from_config(config, attn_implementation=backend, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0).clamp(-1, 1))  # some are left unset
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_config(cls: type, **changes: Any) -> Any:
    """A config of this class with every size shrunk, in its sub-configs too."""
    values = {**_sizes(cls), **_sub_configs(cls), **changes}
    return cls(**values)


def _sizes(cls: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    other = iter(range(3, VOCABULARY))  # ids of images, ends of turns and so on
    names = {own: canonical for canonical, own in getattr(cls, "attribute_map", {}).items()}
    arguments = dict(_defaults(cls))
    for argument, default in arguments.items():
        if re.fullmatch(r".*(token_id|token_index|token_ids)", argument):
            if isinstance(default, (list, tuple)):
                sizes[argument] = [2 if "eos" in argument else next(other) for _ in default][:1]
            elif isinstance(default, int) or argument in IDS:
                sizes[argument] = IDS.get(argument) if argument in IDS else next(other)
        elif isinstance(default, int) and not isinstance(default, bool) and default > 0:
            size = _rule(names.get(argument, argument)) or _rule(argument)
            sizes[argument] = size if size is not None else WIDTH if default > LARGE else default
    if "head_dim" in arguments and arguments["head_dim"] is None:
        sizes["head_dim"] = HEAD_WIDTH  # some classes read None
    if "kv_lora_rank" in arguments and "num_key_value_heads" in arguments:
        sizes["num_key_value_heads"] = HEADS  # latent attention has no groups
    return sizes


def _rule(argument: str) -> int | None:
    return next((size for pattern, size in RULES if re.fullmatch(pattern, argument)), None)


def _defaults(cls: Any) -> Iterator[tuple[str, Any]]:
    for argument in inspect.signature(cls.__init__).parameters.values():
        if argument.kind in (argument.KEYWORD_ONLY, argument.POSITIONAL_OR_KEYWORD) and argument.name != "self":
            yield argument.name, argument.default


def _sub_configs(cls: Any) -> dict[str, Any]:
    """Those that the class names, each shrunk; of an AutoConfig the class that it is by default."""
    held = getattr(cls, "sub_configs", {})
    whole = None
    found = {}
    for name, kind in held.items():
        if kind is transformers.AutoConfig:
            whole = cls() if whole is None else whole
            kind = type(getattr(whole, name, None))
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedConfig):
            found[name] = tiny_config(kind, **EXCEPTIONS.get(getattr(kind, "model_type", ""), {}))
    return found


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
M_ROPE = {**ROPE, "mrope_section": [2, 3, 3]}  # its parts are half of a head
HALF_M_ROPE = {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
BOTH_ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
SHARED = ["mamba", "hybrid", "mamba", "hybrid"]
# name → model_type and arguments: what a family may also be
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # With few heads the scores of many tokens are 0 alike, and which of them is read hangs on the padding.
    "deepseek_v32+index_topk=4": ("deepseek_v32", {"index_topk": 4, "index_n_heads": 16}),
    "glm_moe_dsa+index_topk=4": ("glm_moe_dsa", {"index_topk": 4, "index_n_heads": 16}),
    # as far as from one end of the probe's longest text to the other
    "mistral+sliding_window=7": ("mistral", {"sliding_window": 7}),
}
# model_type → arguments that the rules would set inconsistently
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": BOTH_ROPES},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 10000.0}},
    "cosmos3_edge_text": {"rope_parameters": M_ROPE},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": HEADS, "use_dsa": False},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "glm4v_moe_text": {"rope_parameters": HALF_M_ROPE},
    "glm4v_text": {"rope_parameters": M_ROPE},
    "glm_image_text": {"rope_parameters": M_ROPE},
    "glm_ocr_text": {"rope_parameters": M_ROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16},
    "hunyuan_vl_text": {"rope_parameters": M_ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4},
    "markuplm": {"max_depth": 8, "xpath_unit_hidden_size": 8},
    "nemotron": {"num_key_value_heads": 1},
    "paddleocr_vl_text": {"rope_parameters": M_ROPE},
    "qwen2_5_vl_text": {"rope_parameters": M_ROPE},
    "qwen2_vl_text": {"rope_parameters": M_ROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False, "hidden_size": 32},
    "step3p7_text": {"sliding_window": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": SHARED, "num_key_value_heads": HEADS},
    "zamba2": {"layers_block_type": SHARED, "n_mamba_heads": 4, "num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1},
}
