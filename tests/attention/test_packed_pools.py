"""Taps and pools on a packed model: the same rows, embeddings and gradients as on the padded one."""

from __future__ import annotations

import pytest
import torch
from models import L, build
from packing import (
    LENGTHS,
    assert_close_states,
    batch_of,
    embed,
    lora,
    real,
)
from torch import Tensor, nn

from mlpool import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from mlpool.attention import bidirectional, causal
from mlpool.attention.packed import pack, unpack
from mlpool.taps import Taps, find_layers


def taken(model: nn.Module, batch: dict, how: str) -> Tensor:
    with Taps(model, how) as taps:
        model(**batch)
        return taps.take()


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("name", ["Qwen2", "Gemma3", "GPT-2", "OPT", "StableLM", "BERT"])
def test_taps(name, how):
    model, batch = build(name, "sdpa"), batch_of(name)
    wanted = taken(model, batch, how)
    torch.testing.assert_close(taken(pack(model), batch, how), wanted, atol=1e-5, rtol=0)  # taps on a packed model
    unpack(model)
    with Taps(model, how) as taps:
        pack(model)  # a tapped model packed
        model(**batch)
        torch.testing.assert_close(taps.take(), wanted, atol=1e-5, rtol=0)
        unpack(model)
        model(**batch)
        torch.testing.assert_close(taps.take(), wanted, atol=1e-5, rtol=0)
    pack(model)
    with Taps(model, how) as taps:
        unpack(model)  # beneath the taps
        model(**batch)
        torch.testing.assert_close(taps.take(), wanted, atol=1e-5, rtol=0)
    assert "forward" not in find_layers(model)[0].__dict__ or "below" in dir(find_layers(model)[0].forward)
    torch.testing.assert_close(taken(model, batch, how), wanted, atol=1e-5, rtol=0)
    with Taps(model, how) as taps:
        pack(model)
    torch.testing.assert_close(taken(model, batch, how), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [("pack", "both ways"), ("both ways", "pack")], ids=str)
@pytest.mark.parametrize("name", ["Qwen2", "GPT-2"])
def test_taps_and_bidirectional_in_any_order(name, order):
    model, batch = build(name, "sdpa"), batch_of(name)
    with bidirectional(model):
        wanted = taken(model, batch, "mean")
    for step in order:
        pack(model) if step == "pack" else bidirectional(model)
    torch.testing.assert_close(taken(model, batch, "mean"), wanted, atol=1e-5, rtol=0)
    with Taps(model, "mean") as taps:
        unpack(model)
        pack(model)
        model(**batch)
        torch.testing.assert_close(taps.take(), wanted, atol=1e-5, rtol=0)
    causal(model)
    unpack(model)
    plain = build(name, "sdpa")(**batch).last_hidden_state
    assert_close_states(model(**batch).last_hidden_state, plain, batch)


def pools(how: str) -> dict[str, nn.Module]:
    torch.manual_seed(4)
    sizes = {"num_latents": 3, "num_heads": 2, "head_dim": 4}
    return {
        "multi": MultiLayerPool(32, L, token_pooling=how, **sizes),
        "last": LastLayerPool(32, **sizes),
        "mean": MeanPool(),
        "eos": EosPool(),
        "weights": LayerWeightsPool(32, L, token_pooling=how),
    }


@pytest.mark.parametrize("setting", ["plain", "checkpointing", "lora", "lora and checkpointing"])
def test_pools_and_taps_give_the_same_embedding_and_gradients(setting):
    def make() -> nn.Module:
        model = build("Qwen2", "sdpa")
        model = lora(model) if "lora" in setting else model
        if "checkpointing" in setting:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        return model

    batch, mask = batch_of("Qwen2"), batch_of("Qwen2")["attention_mask"]
    for how in ("last", "mean"):
        for name, pool in pools(how).items():
            results = []
            for packed in (False, True):
                model = pack(make()) if packed else make()
                call = embed(model, batch)
                if name in ("multi", "weights"):
                    with Taps(model, how) as taps:
                        model(**call)
                        embedding = pool(layer_states=taps.take())
                else:
                    embedding = pool(model(**call).last_hidden_state, mask)
                (embedding * torch.linspace(-1, 1, embedding.numel()).view_as(embedding)).sum().backward()
                grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                results.append((embedding.detach(), call["inputs_embeds"].grad, grads))
            (wanted, wanted_grad, wanted_grads), (got, grad, grads) = results
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
            assert (grad - wanted_grad).norm() <= 1e-5 * wanted_grad.norm(), (how, name)
            assert grads.keys() == wanted_grads.keys()
            scale = max(g.norm() for g in wanted_grads.values())
            assert all((grads[n] - g).norm() <= 1e-5 * g.norm() + 1e-6 * scale for n, g in wanted_grads.items())


def test_packed_output_feeds_the_pools():
    model, batch = build("Qwen2", "sdpa"), batch_of("Qwen2")
    with torch.no_grad():
        padded = model(**batch, output_hidden_states=True)
        output = pack(model, padded_output=False)(**batch, output_hidden_states=True)
        assert output.last_hidden_state.shape == (1, sum(LENGTHS), 32)
        torch.testing.assert_close(
            output.last_hidden_state[0], padded.last_hidden_state[real(batch)], atol=1e-5, rtol=0
        )
        assert output.cu_seqlens.tolist() == [0, 9, 15, 16, 22, 25]
        for how in ("last", "mean"):
            for name, pool in pools(how).items():
                several = name in ("multi", "weights")
                one, other = (out.hidden_states if several else out.last_hidden_state for out in (output, padded))
                got = pool(one, cu_seqlens=output.cu_seqlens)
                torch.testing.assert_close(got, pool(other, batch["attention_mask"]), atol=1e-5, rtol=0)
        pack(model)  # only the option
        assert model(**batch).last_hidden_state.shape == padded.last_hidden_state.shape
