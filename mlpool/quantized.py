"""Quantised bases: how one is asked for, what its weights are made of, training through it, and the way back.

A weight is quantised where it holds codes in place of numbers: torchao keeps one as a tensor of several tensors (codes,
scales), bitsandbytes as integers. Of neither can be asked what is asked of any other weight: whether it is finite, or
equal to another. Of the plain tensors that it is made of (`parts`) it can.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names for what is asked for most, in the form of transformers' `quantization_config`.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
    "nf4": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    },
}  # fmt: skip
_PACKAGES = ("torchao", "bitsandbytes")  # called as their methods are


# --- asking for one ---------------------------------------------------------------------------------------------------


def quantization_config(asked: str | Mapping[str, Any]) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    Args:
        asked: a name of QUANTIZATIONS, or the `quantization_config` of a config.json: its quant_method and options.

    Raises:
        ValueError: neither. ModuleNotFoundError: the package that quantises so is missing (named).
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    if isinstance(asked, str) and asked not in QUANTIZATIONS:
        raise ValueError(
            f"quantization is one of {', '.join(QUANTIZATIONS)}, or a mapping like quantization_config in a "
            f"config.json (quant_method and its options); got {asked!r}"
        )
    asked = QUANTIZATIONS[asked] if isinstance(asked, str) else dict(asked)
    require_package(asked)
    try:
        return AutoQuantizationConfig.from_dict(asked)
    except Exception as error:  # whatever a method's own config makes of keys that it lacks or does not know
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"quantization {asked} is no quantization_config of transformers: {why}") from error


def require_package(config: Any) -> None:
    """Raises ModuleNotFoundError where what reads a `quantization_config` (a mapping or an object) is not installed."""
    options = config if isinstance(config, Mapping) else vars(config)
    method = (
        "bitsandbytes" if options.get("load_in_4bit") or options.get("load_in_8bit") else options.get("quant_method")
    )
    method = str(getattr(method, "value", method))
    if method in _PACKAGES and importlib.util.find_spec(method) is None:
        raise ModuleNotFoundError(f"weights quantised by {method} need it: pip install {method}", name=method)


def made_on_loading(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization_config` by which a base in full precision was quantised as it was loaded; None for others."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return json.loads(json.dumps(quantizer.quantization_config.to_dict()))  # type: ignore[no-any-return]


# --- its weights ------------------------------------------------------------------------------------------------------


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of; itself where it is one."""
    if hasattr(weight, "full_tensor") or not hasattr(weight, "__tensor_flatten__"):  # sharded weights are one
        return [weight]
    return [part for name in weight.__tensor_flatten__()[0] for part in parts(getattr(weight, name))]


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is quantised; config and flags are not asked."""
    return any(_holds_codes(parameter) for parameter in model.parameters())


def _holds_codes(weight: Any) -> bool:
    # torchao's tensor says that it is what it stands for.
    return isinstance(weight, Tensor) and any(
        part.element_size() < 2 or not part.is_floating_point() for part in parts(weight)
    )


def quantized_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with a quantised weight and their names."""
    return [(n, module) for n, module in model.named_modules() if _holds_codes(module._parameters.get("weight"))]


# --- training through it ----------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """states [..., in] times a frozen quantised weight [out, in], which is kept as it is for the backward pass.

    torchao's own product keeps the weight in full precision there, of every layer at once: more than was saved.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None


class QuantizedLinear(nn.Linear):
    """A linear layer with torchao's weight; the numbers are those of `nn.Linear` with it."""

    def forward(self, states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(states, self.weight, self.bias)
        product: Tensor = _Product.apply(states, self.weight)
        return product if self.bias is None else product + self.bias


def prepare_layers(model: nn.Module) -> None:
    """Have the layers of a model that torchao has quantised trained through without their weights unpacked; in place.

    Also takes two things off that stand in the way later. torchao's description of each layer cannot be pickled, as
    encoding by several processes does. And where codes were read from a file, transformers would reverse the reading to
    save them again, for which it has no code and torchao's saving no need.
    """
    for _, layer in quantized_layers(model):
        if type(layer) is nn.Linear:
            layer.__class__ = QuantizedLinear
            layer.__dict__.pop("extra_repr", None)
    if conversions := model.__dict__.get("_weight_conversions"):
        model.__dict__["_weight_conversions"] = [one for one in conversions if _can_be_reversed(one)]


def _can_be_reversed(conversion: Any) -> bool:
    with suppress(NotImplementedError):
        conversion.reverse_transform()
        return True
    return False


# --- the way back -----------------------------------------------------------------------------------------------------


def unpack_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Put a plain linear layer, frozen, in the place of each quantised one; returns those with their names.

    ValueError where one is quantised in a way that cannot be undone here (named).
    """
    taken = quantized_layers(model)
    for name, layer in taken:
        weight = _numbers(name, layer)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(layer.training)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias  # type: ignore[assignment]
        model.set_submodule(name, plain)
    return taken


@contextmanager
def unpacked_layers(model: nn.Module) -> Iterator[None]:
    """`unpack_layers`, undone at the end."""
    taken = unpack_layers(model)
    try:
        yield
    finally:
        for name, layer in taken:
            model.set_submodule(name, layer)


@torch.no_grad()
def _numbers(name: str, layer: Any) -> Tensor:
    """The weight [out, in] of a quantised layer, in the precision that its scales have been made for."""
    kind = type(layer.weight).__name__
    try:
        if kind in ("Params4bit", "Int8Params"):
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            found = dequantize_bnb_weight(layer.weight, layer.state if kind == "Int8Params" else None)
        else:
            found = layer.weight.dequantize()
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{name}.weight ({kind}) cannot be turned back into numbers: {error}") from error
    if not isinstance(layer, nn.Linear) or found.dim() != 2:
        raise ValueError(
            f"{name}, a {type(layer).__name__}, is quantised and no linear layer: it cannot be dequantised"
        )
    return found.detach().clone()


def forget(model: Any) -> None:
    """Take off a transformers model, whose weights are plain again, what says that it is quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
