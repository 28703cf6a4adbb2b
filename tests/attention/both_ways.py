"""What the tests of bidirectional attention ask of a model: its outputs, and which tokens each layer reads."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from models import DECODERS, REFUSED, D, alone, pad
from torch import Tensor, nn

from mlpool.taps import find_layers

BACKENDS = ("eager", "sdpa", "flex_attention")


def taken(names: Iterable[str], backends: Iterable[str]) -> list:
    """Every family on every backend that the library lets it take."""
    pairs = [(name, backend) for name in names for backend in backends if (name, backend) not in REFUSED]
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs]


MATRIX = taken(DECODERS, BACKENDS)
TRAINED = [case for case in MATRIX if case.values[1] != "flex_attention"]  # torch: no flex backward on a CPU


def run(model: nn.Module, batch: dict, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs)[0]


def outputs(model: nn.Module, rows: list[Tensor], side: str = "right") -> list[Tensor]:
    """The last states of each text, [n, D], from one padded batch."""
    batch = pad(rows, side)
    hidden = run(model, batch)
    return [h[m.bool()] for h, m in zip(hidden, batch["attention_mask"], strict=True)]


def lone(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    return [run(model, alone(row))[0] for row in rows]


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def reach(model: nn.Module, text: Tensor, others: Iterable[Tensor] = ()) -> list[Tensor]:
    """For each layer alone, bool [T, T]: does its output at i answer to noise on its own input at j?

    Asked of all j at once, each in a copy of the text; `others` are padded beside them.
    """
    trunk, layers = find_layers(model)
    count, calls = len(text), [None] * len(layers)
    handles = [
        layer.register_forward_pre_hook(lambda _, a, k, i=i: calls.__setitem__(i, (a, k)), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    run(trunk, pad([text] * count + [*others]), use_cache=False)
    for handle in handles:
        handle.remove()
    noise = torch.stack([torch.randn(D, generator=torch.Generator().manual_seed(j)) for j in range(count)])
    each = torch.arange(count)
    found = []
    for layer, (args, kwargs) in zip(layers, calls, strict=True):
        hidden = args[0].clone()
        hidden[each, each] += noise
        answers = first(layer, (hidden, *args[1:]), kwargs) - first(layer, args, kwargs)
        found.append((answers[:count, :count].abs().amax(-1) > 1e-6).T)
    return found


def first(layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    with torch.no_grad():
        output = layer(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def state(model: nn.Module) -> dict:
    """Everything that undoing has to restore."""
    ours = ("_output_capturing_hooks_installed",)
    plain = (bool, int, float, str, type(None))
    found = {"": model.config.to_dict(), "dict": dict(vars(model.config))}
    for name, module in model.named_modules():
        found[name] = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ours}
        found[f"{name} forward"] = "forward" in vars(module)
        found[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[f"{name} names"] = sorted(set(vars(module)) - set(ours))
    return found
