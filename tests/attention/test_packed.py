"""Packed against padded: values, gradients, windows, and texts that do not see each other."""

from __future__ import annotations

import pytest
import torch
from models import ENCODERS, WINDOWED, build, pad, texts
from packing import (
    FAMILIES,
    LENGTHS,
    REFUSED_PACKED,
    assert_close_states,
    assert_same,
    backend_for,
    batch_of,
    directions,
    embed,
    lora,
    masked,
    real,
    run,
)
from torch import Tensor, nn

from mlpool.attention import bidirectional, check_attention
from mlpool.attention.packed import pack, unpack
from mlpool.taps import Taps, find_layers


# --- packed equals padded ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "both_ways"), directions(FAMILIES))
def test_equals_padded(name, both_ways):
    model, batch = build(name, backend_for(name)), batch_of(name)
    if both_ways:
        bidirectional(model, check=False)
    wanted = run(model, batch)
    before = {key: type(module) for key, module in model.named_modules()}
    assert pack(model) is model
    got = run(model, batch)
    assert_same(got, wanted, real(batch))
    with torch.no_grad():  # by ids
        assert_close_states(model(**batch).last_hidden_state, wanted[0][-1], batch)
    check_attention(model, "bidirectional" if both_ways or name in ENCODERS else "causal")
    unpack(model)
    assert {key: type(module) for key, module in model.named_modules()} == before
    assert "forward" not in find_layers(model)[0].__dict__ or both_ways
    assert model.config._attn_implementation == backend_for(name)
    assert_same(masked(run(model, batch), batch), masked(wanted, batch), real(batch), atol=0)


@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", [name for name in WINDOWED if name not in REFUSED_PACKED])
def test_windows_equal_the_eager_padded_model(name, both_ways):
    model, batch = build(name, "eager", among=WINDOWED), pad(texts((9, 14, 1, 5)), "mixed")
    if both_ways:
        bidirectional(model, check=False)
    wanted = run(model, batch)
    pack(model)
    assert_same(run(model, batch), wanted, real(batch))
    whole = build(name, "eager")
    assert (whole(**batch).last_hidden_state - wanted[0][-1])[real(batch)].abs().max() > 1e-3  # the window binds


def test_the_window_of_an_encoder():
    changes = {"local_attention": 4, "global_attn_every_n_layers": 2}
    model, batch = build("ModernBERT", "eager", **changes), pad(texts((9, 14, 1, 5)))
    wanted = run(model, batch)
    assert_same(run(pack(model), batch), wanted, real(batch))


def test_the_per_call_flag():
    model, batch = build("Llama", "sdpa"), batch_of("Llama")
    with torch.no_grad():
        wanted = model(**batch, is_causal=False).last_hidden_state
        causal_one = model(**batch).last_hidden_state
        pack(model)
        assert_close_states(model(**batch, is_causal=False).last_hidden_state, wanted, batch)
        assert_close_states(model(**batch).last_hidden_state, causal_one, batch)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (7,), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("name", ["Qwen2", "BERT"])
def test_odd_batches(name, lengths):
    model, batch = build(name, "sdpa"), pad(texts(lengths))
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        pack(model)
        for call in (batch, {"input_ids": batch["input_ids"]}):
            torch.testing.assert_close(model(**call).last_hidden_state, wanted, atol=1e-5, rtol=0)
        as_float = {**batch, "attention_mask": batch["attention_mask"].float()}
        torch.testing.assert_close(model(**as_float).last_hidden_state, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Qwen2", "Gemma3", "GPT-2", "StableLM", "BERT"])
def test_checkpointing(name, reentrant):
    model, batch = build(name, "sdpa").train(), batch_of(name)
    for module in model.modules():  # the families' own dropouts
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wanted = run(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    pack(model)
    assert_same(run(model, batch), wanted, real(batch))


@pytest.mark.parametrize("order", ["pack first", "adapter first"])
def test_lora(order):
    plain, batch = lora(build("Qwen2", "sdpa")), batch_of("Qwen2")
    wanted = run(plain, batch)
    model = build("Qwen2", "sdpa")
    model = lora(pack(model)) if order == "pack first" else pack(lora(model))
    got = run(model, batch)
    assert len(got[1]) > 10
    assert_same(got, wanted, real(batch))
    unpack(model)
    assert type(find_layers(model)[0]) is type(find_layers(plain)[0])


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "BERT"])
def test_autocast(name):
    model, batch = build(name, "sdpa"), batch_of(name)
    with torch.no_grad():
        exact = model(**batch).last_hidden_state[real(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            wanted = model(**batch).last_hidden_state
            pack(model)
            got = model(**batch).last_hidden_state
    assert got.dtype == wanted.dtype
    assert (got[real(batch)] - exact).norm() <= 2 * (wanted[real(batch)] - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    # right: rotation by another position is computed in float32
    model, batch = build("Qwen2", "sdpa", dtype=dtype), batch_of("Qwen2", "right")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state[real(batch)]
        got = pack(model)(**batch).last_hidden_state[real(batch)]
    assert got.dtype == dtype
    limit = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (got - wanted).norm() <= limit * wanted.norm()


def test_attention_dropout_is_applied_while_training():
    model, batch = build("Llama", "sdpa", attention_dropout=0.5), batch_of("Llama")
    pack(model)
    quiet = model(**batch).last_hidden_state
    model.train()
    torch.manual_seed(0)
    one, other = (model(**batch).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)
    assert not torch.equal(one, quiet)
    torch.manual_seed(0)
    assert torch.equal(one, model(**batch).last_hidden_state)


# --- texts do not see each other --------------------------------------------------------------------------------------
@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "Gemma3", "StableLM", "OPT"])
def test_no_leakage(name, both_ways):
    model = build(name, "sdpa")
    if both_ways:
        bidirectional(model, check=False)
    pack(model)
    rows = texts((7, 9, 4))
    others = [texts((7,), seed=9)[0], rows[1], texts((4,), seed=8)[0]]
    with torch.no_grad():
        alone = model(**pad([rows[1]])).last_hidden_state[0]
        mixed, changed = (model(**pad(these)).last_hidden_state[1, :9] for these in (rows, others))
        moved = model(**pad([*rows[::2], rows[1]])).last_hidden_state[2, :9]
    assert torch.equal(mixed, changed)
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed, moved, atol=1e-5, rtol=0)
    # nor by gradients
    call = embed(model, pad(rows))
    model(**call).last_hidden_state[1].sum().backward()
    grad = call["inputs_embeds"].grad
    assert grad[1].any()
    assert not grad[[0, 2]].any()


def test_one_call_of_the_layers_sees_no_padding():
    model, batch = pack(build("Qwen2", "sdpa")), batch_of("Qwen2")
    seen = []
    find_layers(model)[1][0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(**batch)
    assert seen == [(1, sum(LENGTHS), 32)]


def test_what_is_kept_for_the_backward_shrinks_with_the_padding():
    """Bytes, not time: the benchmark measures that."""
    rows = texts((60, 4, 9, 2, 6, 3, 5, 8))
    kept = []
    for packed in (False, True):
        model = build("Qwen2", "sdpa")
        model = pack(model) if packed else model
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def save(tensor: Tensor, seen=seen, weights=weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), Taps(model) as taps:
            model(**pad(rows))
            loss = taps.take().sum()
        kept.append(sum(seen.values()))
        loss.backward()
    padded, real_tokens = 8 * 60, sum(map(len, rows))
    assert kept[0] >= 0.9 * padded / real_tokens * kept[1]
