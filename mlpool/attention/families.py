"""What a model family needs beyond the flag `is_causal=False`, in one table; no model code is copied.

A family that is not in the table needs nothing more, or is not known: either way the self-test decides. Tried with
transformers 5.17 and 5.23.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..version import need

FLOOR = (5, 17)
PACKED, PACKED_MARK = "mlpool_packed", "_mlpool_packed"  # the backend; what `pack` leaves on a trunk
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", PACKED)
NO_LIMIT = 2**30  # a window no text reaches the end of


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        refused: why the family cannot be made bidirectional.
        refused_backends: backend → why not on this one.
        serving_flag: value of `config.use_bidirectional_attention`, where serving tools (vLLM,
            text-embeddings-inference) read it from the saved config; None: they do not.
        own_mode: that flag is the library's own bidirectional mode, and all that is set. Beside it `is_causal=False`
            would widen the windows by one token on eager, sdpa and flex but not on flash-attention.
        halves_window: the family's own mode splits the causal window between both sides.
        text_positions: position_ids must be given, or learned positions count left padding.
        advice: known causes, said when the self-test fails.
        warning: said once when the family is patched.
    """

    refused: str = ""
    refused_backends: Mapping[str, str] = field(default_factory=dict)
    serving_flag: bool | None = None
    own_mode: bool = False
    halves_window: bool = False
    text_positions: bool = False
    advice: str = ""
    warning: str = ""


_NO_REGISTRY = "its attention does not go through the library's registry, so no other backend reaches it"
_SOFTCAP = (
    "attn_logit_softcapping is set, and scaled_dot_product_attention cannot soft-cap; load with "
    "attn_implementation='eager'"
)
_CHUNKS = "its layers attend in chunks, and the chunked mask ignores is_causal"
_SERVED = Family(serving_flag=True)
_POSITIONS = Family(
    text_positions=True,
    advice="its learned positions are counted from the start of the row, padding included, unless position_ids are "
    "given: bidirectional(model) gives them; without it pad on the right",
)
_ALIBI = (
    "its ALiBi bias grows with the key's position: as a bidirectional model each token prefers the text's end, and "
    "the more so the further away"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma"), _SERVED),
    "gemma2": Family(serving_flag=True, refused_backends={"sdpa": _SOFTCAP}),
    "gemma3_text": Family(serving_flag=True, own_mode=True, halves_window=True),
    "stablelm": Family(
        advice="its attention reads is_causal from each module only, which a saved config does not set: a reloaded "
        "model is causal in unpadded batches until bidirectional(model) is called again"
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "xglm", "biogpt"), _POSITIONS),
    "gpt_neo": Family(refused="its attention holds a causal mask of its own, which no flag reaches"),
    "bloom": Family(warning=_ALIBI),
    "falcon_h1": Family(warning="its attention alone; the Mamba half of every layer stays causal (attention only)"),
    "falcon": Family(refused_backends=dict.fromkeys(("flex_attention", PACKED), _NO_REGISTRY)),
    **dict.fromkeys(("llama4", "llama4_text"), Family(refused=_CHUNKS)),
}


def family_of(config: Any) -> Family:
    """The table's row for this (text) config; an empty one for a family that is not in it."""
    return FAMILIES.get(getattr(config, "model_type", ""), Family())


def flagged(config: Any) -> bool:
    """Whether the config alone makes the model bidirectional."""
    return getattr(config, "is_causal", None) is False or bool(getattr(config, "use_bidirectional_attention", None))


def require_text_model(model: nn.Module, trunk: nn.Module) -> None:
    """ValueError for a wrapper around a text model, which is named."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config") and config.get_text_config() is not config:
            raise ValueError(
                f"{type(module).__name__} is multimodal and builds masks and positions outside its text model; "
                f"take the {type(trunk).__name__} inside it and call that"
            )


def warning_of(config: Any) -> str:
    """What to say once of this model before it is patched, or ""."""
    return _ALIBI if getattr(config, "alibi", False) else family_of(config).warning


def require_transformers() -> Any:
    """transformers, or an ImportError that says what to install."""
    transformers = need("transformers", "mlpool.attention patches Hugging Face models: pip install 'mlpool[st]'")
    version, floor = transformers.__version__, ".".join(map(str, FLOOR))
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR:
        raise ImportError(
            f"transformers {version} is too old: before {floor} `is_causal=False` and packed offsets do not reach "
            f"every family; pip install 'transformers>={floor}' (pip install 'mlpool[st]' does so)"
        )
    return transformers


def check_backend(config: Any) -> None:
    """ValueError for an attention backend that is unknown, or that this family cannot use; with the reason."""
    backend, name = backend_of(config), getattr(config, "model_type", "?")
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}: whether it masks padding and both directions rightly is not "
            f"known; load the model with attn_implementation= one of {', '.join(BACKENDS)}"
        )
    reason = family_of(config).refused_backends.get(backend)
    if reason and not (name == "gemma2" and getattr(config, "attn_logit_softcapping", None) is None):
        raise ValueError(f"{name} cannot run on {backend}: {reason}")


def backend_of(config: Any) -> str:
    """The attention implementation in use; "eager" where none is set."""
    return getattr(config, "_attn_implementation", None) or "eager"


def window_of(config: Any) -> int | None:
    """The number of tokens that the sliding layers see (the fewest), or None where no layer slides."""
    if varies_by_layer(config, "sliding_window"):
        windows = (layer.sliding_window for layer in config.per_layer_config)
        return min((window for window in windows if window), default=None)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return window


def varies_by_layer(config: Any, name: str) -> bool:
    """Whether each layer has a value of its own, so that the config refuses to name one."""
    return name in (getattr(config, "per_layer_attributes", None) or ())


def attentions(layers: nn.Module) -> Iterator[nn.Module]:
    """The self-attention modules that carry an `is_causal` of their own."""
    for module in layers.modules():
        if "is_causal" in module.__dict__ and not getattr(module, "is_cross_attention", False):
            yield module
