"""LoRA on an embedder's backbone: add, load, merge; and which base model an adapter belongs to."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ..quantized import forget, is_quantized, parts, unpack_layers
from ..version import need

E = TypeVar("E", bound=SentenceTransformer)

# The paper's: attention and feed-forward of Llama, Mistral and Qwen.
PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    embedder: E,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.1,
    target_modules: Sequence[str] | str | None = None,
    **options: Any,
) -> E:
    """Freeze the backbone and put LoRA on it, in place; return the embedder. The pool stays trainable.

    Args:
        rank, alpha, dropout: the paper's by default.
        target_modules: names of linear layers, or "all-linear". None: q, k, v, o, gate, up and down where the model has
            them all (the paper's), otherwise all linear layers.
        options: further arguments of `peft.LoraConfig`.

    Raises:
        ModuleNotFoundError: peft is missing. ValueError: there is an adapter already.
    """
    peft = _peft()
    model: Any = embedder[0].model
    if has_adapter(model):
        raise ValueError("this embedder has an adapter already; merge(embedder) it before adding another")
    if target_modules is None:
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        target_modules = list(PAPER_TARGETS) if leaves.issuperset(PAPER_TARGETS) else "all-linear"
    backbone: Any = embedder[0]
    backbone.base_fingerprint = fingerprint(model)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=alpha, lora_dropout=dropout,
        target_modules=target_modules, **{"revision": _commit(model), **options},
    ))  # fmt: skip
    return embedder


def merge(embedder: E, dequantize: bool = False) -> E:
    """Fold LoRA into the weights, in place; return the embedder, which then has no adapter.

    Each sum is made in float64 and rounded once, to the dtype of the weight.

    Args:
        dequantize: first turn the weights of a quantised base back into numbers, of the model's dtype.

    Raises:
        ValueError: there is no adapter to merge, or a merged weight (named) is infinite or NaN, or does not compute
            what it and its adapter do; a quantised base, without `dequantize`.
    """
    model: Any = embedder[0].model
    if not has_adapter(model):
        raise ValueError("there is no adapter to merge: this embedder holds full weights")
    if is_quantized(model) and not dequantize:
        raise ValueError(
            "the base is quantised, and a sum rounded to its codes would lose most of the adapter: merge(embedder, "
            "dequantize=True), --dequantize, makes full weights; or keep the adapter apart"
        )
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    unpacked = {layer.rpartition(".")[0] for layer in _unpack(model)}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if name in unpacked:  # peft's layer for a quantised weight would quantise the sum
                module.__class__ = Linear
            model.set_submodule(name, _merged(name, module))
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)  # as any model with full weights
    backbone: Any = embedder[0]
    backbone.base_fingerprint = None
    return embedder


def dequantize(embedder: E) -> E:
    """Turn the weights of a quantised base back into numbers, in place; return the embedder. It embeds as before.

    Raises:
        ValueError: the base is not quantised, or so that it cannot be undone; there is an adapter on it, which belongs
            to the base as it is.
    """
    model: Any = embedder[0].model
    if has_adapter(model):
        raise ValueError("there is an adapter on the quantised base: merge(embedder, dequantize=True)")
    if not _unpack(model):
        raise ValueError("the weights of this embedder are not quantised")
    model.requires_grad_(True)
    return embedder


def _unpack(model: Any) -> list[str]:
    """Full weights in place of quantised ones, for good; the names of their layers."""
    names = [name for name, _ in unpack_layers(model)]
    if names:
        forget(model)
    return names


@torch.no_grad()
def _merged(name: str, module: Any) -> nn.Module:
    """The layer below an adapter with the adapter in its weights."""
    layer = module.get_base_layer()
    kept = [(parameter, parameter.dtype) for parameter in layer.parameters()]
    if layer.weight.device.type != "mps":  # which has no float64
        module.double()
    module.eval()
    probe = torch.randn(4, module.in_features).to(layer.weight) if isinstance(layer, nn.Linear) else None
    expected = None if probe is None else module(probe)
    try:
        module.merge(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"merging makes {name}.weight infinite or NaN; the adapter is damaged ({error})") from error
    for parameter, dtype in kept:
        parameter.data = parameter.data.to(dtype)
        if not parameter.isfinite().all():
            raise ValueError(f"merging makes {name}.weight infinite or NaN in {dtype}; merge in a wider dtype")
    if probe is not None and expected is not None:
        wide = nn.functional.linear(probe, layer.weight.to(probe), None if layer.bias is None else layer.bias.to(probe))
        # Each weight is rounded by half a unit at most, and the errors of a row do not all point one way.
        allowed = 4 * torch.finfo(layer.weight.dtype).eps * layer.weight.to(probe).norm() * probe.norm()
        if not (wide - expected).norm() <= allowed:
            off = (wide - expected).norm() / expected.norm()
            raise ValueError(f"merged, {name}.weight does not compute what it and its adapter do: off by {off:.1e}")
    return layer


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter was added to this transformers model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def load_adapter(model: nn.Module, name: str, place: dict[str, Any]) -> None:
    """Put the saved adapter of a folder or Hub name on a base model, trainable as after `add_lora`; or a ValueError."""
    _peft()
    place = {key: value for key, value in place.items() if value}
    conversions = model.__dict__.get("_weight_conversions")
    try:
        model.load_adapter(name, is_trainable=True, adapter_kwargs=place)  # type: ignore[operator]
    except RuntimeError as error:
        raise ValueError(f"the adapter in {name} does not fit {type(model).__name__}: {error}") from error
    for config in model.peft_config.values():  # type: ignore[operator, union-attr]
        # Where the base was found this time, for the next save.
        config.base_model_name_or_path, config.revision = model.name_or_path, _commit(model)
    # It leaves the adapter's renaming of keys there, by which a merged model would be saved under wrong names.
    model.__dict__["_weight_conversions"] = conversions


def fingerprint(model: nn.Module) -> str:
    """Which base model this is, adapters aside: a hash of every weight's name and shape, and a few of its numbers.

    The numbers are kept, not hashed: the same model in float32, bfloat16 and float16 is rounded differently.
    """
    digest, numbers = hashlib.sha256(), []
    for name, weight in sorted(model.named_parameters()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}".encode())
            numbers += [part.detach().flatten()[:8].float().cpu() for part in parts(weight)]
    values = torch.cat(numbers).bfloat16().view(torch.int16).numpy()
    return f"{digest.hexdigest()[:16]}:{base64.b64encode(values.tobytes()).decode()}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, whatever the precision it was loaded in."""
    structure, _, numbers = one.partition(":")
    expected, _, others = other.partition(":")
    # Two roundings to bfloat16 may be a step (2^-7) apart, and float16 ends at steps of 6e-8.
    return structure == expected and torch.allclose(_numbers(numbers), _numbers(others), rtol=2**-7, atol=1e-7)


def _numbers(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()


def check_base(model: nn.Module, expected: str | None, base: str, folder: str) -> None:
    """Raises ValueError where an adapter was trained on another base model than the one loaded."""
    if expected is not None and not same_base(fingerprint(model), expected):
        raise ValueError(
            f"{folder} holds an adapter for another base model: the weights of {base} are not those it was trained on; "
            "pass base= with the folder or name of the right one"
        )


def _commit(model: Any) -> str | None:
    """The commit of a base model from the Hub, which may change under its name."""
    return getattr(model.config, "_commit_hash", None)


def _peft() -> Any:
    return need("peft", "LoRA needs peft: pip install 'mlpool[train]'")
