"""LoRA on an embedder's backbone: add, load, merge; and which base model an adapter belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .embedder import Embedder

# The paper's: attention and feed-forward of Llama, Mistral and Qwen.
PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    embedder: Embedder,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.1,
    target_modules: Sequence[str] | str | None = None,
    **options: Any,
) -> Embedder:
    """Freeze the backbone and put LoRA on it, in place; return the embedder. The pool stays trainable.

    Args:
        rank, alpha, dropout: the paper's by default.
        target_modules: names of linear layers, or "all-linear". None: q, k, v, o, gate, up and down where the model has
            them all (the paper's), otherwise all linear layers.
        options: further arguments of `peft.LoraConfig`.

    Raises:
        ModuleNotFoundError: peft is missing. ValueError: there is an adapter already.
    """
    LoraConfig = _peft().LoraConfig
    model: Any = embedder[0].model
    if has_adapter(model):
        raise ValueError("this embedder has an adapter already; merge(embedder) it before adding another")
    if target_modules is None:
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        target_modules = list(PAPER_TARGETS) if leaves.issuperset(PAPER_TARGETS) else "all-linear"
    backbone: Any = embedder[0]
    backbone.base_fingerprint = fingerprint(model)
    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=alpha, lora_dropout=dropout,
            target_modules=target_modules, **options,
        )
    )  # fmt: skip
    return embedder


def merge(embedder: Embedder) -> Embedder:
    """Fold LoRA into the weights, in place; return the embedder, which then has no adapter.

    Raises:
        ValueError: there is no adapter to merge, or merging makes a weight infinite or NaN.
    """
    model: Any = embedder[0].model
    if not has_adapter(model):
        raise ValueError("there is no adapter to merge: this embedder holds full weights")
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    backbone: Any = embedder[0]
    backbone.base_fingerprint = None
    return embedder


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter was added to this transformers model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def load_adapter(model: nn.Module, name: str, place: dict[str, Any]) -> None:
    """Put the saved adapter of a folder or Hub name on a base model.

    Raises:
        ValueError: it does not fit the model.
    """
    _peft()
    place = {key: value for key, value in place.items() if value}
    conversions = model.__dict__.get("_weight_conversions")
    try:
        model.load_adapter(name, adapter_kwargs=place)  # type: ignore[operator]
    except RuntimeError as error:
        raise ValueError(f"the adapter in {name} does not fit {type(model).__name__}: {error}") from error
    # It leaves the adapter's renaming of keys there, by which a merged model would be saved under wrong names.
    model.__dict__["_weight_conversions"] = conversions


def fingerprint(model: nn.Module) -> str:
    """Which base model this is, adapters aside: names, shapes and a few numbers of every weight, hashed.

    The numbers are rounded to bfloat16, so that loading in float32 or bfloat16 makes no difference.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "lora_" not in name:
            numbers = weight.detach().flatten()[:16].float().bfloat16().view(torch.int16).cpu().numpy()
            digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()


def check_base(model: nn.Module, expected: str | None, base: str, folder: str) -> None:
    """Raises ValueError where an adapter was trained on another base model than the one loaded."""
    if expected is not None and fingerprint(model) != expected:
        raise ValueError(
            f"{folder} holds an adapter for another base model: the weights of {base} are not those it was trained on; "
            "pass base= with the folder or name of the right one"
        )


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'mlpool[train]'") from error
    return peft
