"""Batches for the tests of packed execution, and what is the same packed and padded."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from models import DECODERS, ENCODERS, REFUSED, pad, texts
from torch import Tensor, nn

REFUSED_PACKED = ("Gemma2", "Falcon")
FAMILIES = [name for name in (*DECODERS, *ENCODERS) if name not in REFUSED_PACKED]
# padded on the left, the library counts the padding as positions there (RoBERTa: of embeddings), and is wrong
RIGHT_ONLY = ("GPT-2", "BERT", "RoBERTa", "XLM-R")
LENGTHS = (9, 6, 1, 6, 3)


def directions(names: Iterable[str]) -> list:
    """Each family as it is, and patched; an encoder is bidirectional as it is."""
    return [
        pytest.param(name, both_ways, id=f"{name}-{'bidirectional' if both_ways else 'causal'}")
        for name in names
        for both_ways in ((False,) if name in ENCODERS else (False, True))
    ]


def backend_for(name: str) -> str:
    return "eager" if (name, "sdpa") in REFUSED else "sdpa"


def batch_of(name: str, side: str = "mixed", **options) -> dict[str, Tensor]:
    return pad(texts(LENGTHS, **options), "right" if name in RIGHT_ONLY else side)


def real(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def embed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same call by inputs_embeds, a leaf with a gradient."""
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


def projection(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    return (hidden.float() * weights * mask.unsqueeze(-1)).sum()


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All hidden states, and the gradients of a projection of all of them: parameters and embeddings."""
    call = embed(model, batch)
    output = model(**call, output_hidden_states=True)
    states = [*output.hidden_states, output.last_hidden_state]
    model.zero_grad()
    sum(projection(state, batch["attention_mask"]) for state in states).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [state.detach() for state in states], {**found, "inputs_embeds": call["inputs_embeds"].grad}


def assert_same(got, wanted, mask: Tensor, atol: float = 1e-5) -> None:
    (states, grads), (wanted_states, wanted_grads) = got, wanted
    for state, other in zip(states, wanted_states, strict=True):
        torch.testing.assert_close(state[mask], other[mask], atol=atol, rtol=0)
        assert not state[~mask].any()
    assert grads.keys() == wanted_grads.keys()
    scale = max(float(g.norm()) for g in wanted_grads.values())
    for name, grad in wanted_grads.items():
        if name == "inputs_embeds":
            assert not grads[name][~mask].any()
            grad = grad * mask.unsqueeze(-1)  # of padding: what the first layers' states of padding give
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6 * scale, name


def assert_close_states(state: Tensor, other: Tensor, batch: dict[str, Tensor]) -> None:
    torch.testing.assert_close(state[real(batch)], other[real(batch)], atol=1e-5, rtol=0)


def masked(results, batch):
    keep = real(batch).unsqueeze(-1)
    grads = {**results[1], "inputs_embeds": results[1]["inputs_embeds"] * keep}
    return [state * keep for state in results[0]], grads


def lora(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()
