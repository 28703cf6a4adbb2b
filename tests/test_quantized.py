"""A quantised base: loaded, trained with LoRA, saved, cut, merged, exported, and tested for its attention."""

import copy
import importlib.util
import logging
import pickle

import pytest
import tiny
import torch
from tiny import TEXTS
from torch import nn

import mlpool
from mlpool import quantized
from mlpool.attention import AttentionCheckError, bidirectional, causal, check_attention
from mlpool.embedder import add_lora, load, merge
from mlpool.embedder.adapters import dequantize, fingerprint, same_base
from mlpool.embedder.identity import identity
from mlpool.embedder.saved import _differences
from mlpool.exchange.export import export
from mlpool.pooling.base import broken_weights
from mlpool.quantized import QuantizedLinear, is_quantized, parts, quantized_layers
from mlpool.taps import find_layers
from mlpool.training.losses import InfoNCE
from mlpool.training.memory import saved_bytes
from mlpool.training.trainer import prepare, trained_weights

torchao = pytest.importorskip("torchao.quantization")
DESIGN = "multi-layer-bidirectional"
INT8 = quantized.QUANTIZATIONS["int8"]


def made(lora: bool = False, **options):
    embedder = tiny.embedder(options.pop("design", DESIGN), quantization=options.pop("quantization", "int8"), **options)
    if lora:
        add_lora(embedder, rank=4, dropout=0.0)
        tiny.shake(embedder[0].model, 0.05, only="lora_B")
    return embedder


def far(one, other):
    return abs(one - other).max()


# --- asking for one ---------------------------------------------------------------------------------------------------


def test_every_way_to_ask(monkeypatch):
    expected = made().encode(TEXTS)
    config = quantized.quantization_config("int8")
    for way in ({"quantization": INT8}, {"quantization": None, "model_kwargs": {"quantization_config": config}}):
        assert far(made(**way).encode(TEXTS), expected) == 0
    assert far(tiny.embedder().encode(TEXTS), expected) > 0
    with pytest.raises(ValueError, match="quantization and model_kwargs' quantization_config are the same"):
        made(model_kwargs={"quantization_config": config})
    with pytest.raises(ValueError, match=r"quantization is one of int8, nf4, or a mapping .*; got 'int7'"):
        made(quantization="int7")
    with pytest.raises(ValueError, match=r"is no quantization_config of transformers: .*no `quant_method`"):
        made(quantization={"bits": 4})
    with pytest.raises(ValueError, match=r"is no quantization_config of transformers: it lacks 'quant_type'"):
        made(quantization={"quant_method": "torchao"})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with pytest.raises(ModuleNotFoundError, match="quantised by torchao need it: pip install torchao"):
        made()


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    made().save(tmp_path / "e")
    found = importlib.util.find_spec
    gone = ("torchao", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else found(name, *a))
    with pytest.raises(ModuleNotFoundError, match="pip install torchao"):
        load(tmp_path / "e")
    for asked in ("nf4", {"load_in_8bit": True}):
        with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
            made(quantization=asked)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_weights():
    embedder, other = made(), made(family="llama")
    assert is_quantized(embedder)
    assert not is_quantized(tiny.embedder())
    layers = dict(quantized_layers(embedder[0].model))
    assert {name.rpartition(".")[2] for name in layers} == set(mlpool.embedder.adapters.PAPER_TARGETS)
    layer = layers["layers.1.mlp.up_proj"]
    assert [part.dtype for part in parts(layer.weight)] == [torch.int8, torch.float32, torch.int8]
    again = pickle.loads(pickle.dumps(embedder))
    assert not _differences(embedder, again)
    assert identity(embedder) == identity(again) != identity(other)
    assert same_base(fingerprint(embedder[0].model), fingerprint(again[0].model))
    parts(dict(quantized_layers(again[0].model))["layers.1.mlp.up_proj"].weight)[0][0, 0] ^= 64
    assert _differences(embedder, again) == ["backbone.model.layers.1.mlp.up_proj.weight differs"]
    assert identity(embedder) != identity(again)
    assert not same_base(fingerprint(embedder[0].model), fingerprint(again[0].model))
    parts(layer.weight)[1][3] = torch.nan
    assert broken_weights(embedder) == ["the weight backbone.model.layers.1.mlp.up_proj.weight holds NaN"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_full_weights_and_unpacks_none():
    """Gradients as through the numbers that the codes stand for; nothing of a weight is kept for the backward pass."""
    embedder = made(lora=True).eval()
    full = copy.deepcopy(embedder)
    quantized.unpack_layers(full)
    columns = [embedder.preprocess(texts) for texts in (TEXTS[:3], TEXTS[4:])]
    kept = []
    for model in (embedder, full):
        with saved_bytes(model) as count:
            loss = InfoNCE(model, cached=False, mini_batch_tokens=None)([dict(c) for c in columns])
        kept.append(count())
        loss.backward()
    pairs = zip(embedder.named_parameters(), full.parameters(), strict=True)
    grads = {name: (p.grad, q.grad) for (name, p), q in pairs if p.grad is not None}
    assert any("lora_A" in name for name in grads)
    for name, (got, expected) in grads.items():
        assert (got - expected).norm() <= 1e-4 * expected.norm(), name
    assert kept[0] <= kept[1]


def test_lora_learns_and_codes_stay(tmp_path):
    embedder = made(lora=True).train()
    prepare(embedder)
    before = {name: [t.clone() for t in parts(p)] for name, p in embedder.named_parameters() if not p.requires_grad}
    columns = [embedder.preprocess(texts) for texts in (TEXTS[:3], TEXTS[4:])]
    loss = InfoNCE(embedder, mini_batch_tokens=16, cached=True)
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        value = loss([dict(c) for c in columns])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    now = dict(embedder.named_parameters())
    assert len(before) > 28
    assert all(torch.equal(a, b) for name, kept in before.items() for a, b in zip(kept, parts(now[name]), strict=True))
    embedder.eval().save(tmp_path / "e")
    assert far(load(tmp_path / "e").encode(TEXTS), embedder.encode(TEXTS)) == 0


def test_training_from_a_config(tmp_path, caplog):
    from mlpool.training.train import train

    rows = [{"query": f"number {i}", "positive": f"the number {i} itself"} for i in range(8)]
    config = {
        "model": str(tiny.base()), "design": "mean-bidirectional", "data": rows, "lora": {"rank": 2}, "max_steps": 2,
        "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    with caplog.at_level(logging.ERROR):
        trained = train(config, ["--quantization", "int8"])
    assert is_quantized(trained)
    again = load(tmp_path / "run")
    assert far(again.encode(TEXTS), trained.encode(TEXTS)) == 0
    assert far(again.encode(TEXTS), made(design="mean-bidirectional").encode(TEXTS)) > 1e-4
    assert trained_weights(again, tmp_path / "run/checkpoint-1")
    with pytest.raises(ValueError, match=r"a quantised base cannot be trained itself: put LoRA on it \(lora: true"):
        train({**config, "lora": None, "quantization": "int8", "output_dir": str(tmp_path / "other")})


# --- saving, merging, exporting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["auto", 2])
@pytest.mark.parametrize("lora", [False, True], ids=["codes", "adapter"])
def test_saved_and_loaded(lora, depth, tmp_path):
    """The codes themselves, or the adapter and how its base was quantised."""
    embedder = made(lora, depth=depth)
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "e")
    assert (tmp_path / "e/model.safetensors").exists() != lora
    again = load(tmp_path / "e")
    assert far(again.encode(TEXTS), expected) == 0
    assert identity(again) == identity(embedder)
    assert len(quantized_layers(again)) == 7 * (4 if depth == "auto" else 2)
    assert all(isinstance(layer, QuantizedLinear) for _, layer in quantized_layers(again))
    if depth != "auto":  # what follows has no more of a cut one to say
        return
    again.save(tmp_path / "twice")
    assert far(load(tmp_path / "twice").encode(TEXTS), expected) == 0
    with pytest.raises(ValueError, match="has decided quantization; leave it out"):
        load(tmp_path / "e", quantization="int8")
    if not lora:  # a base that was quantised before: an adapter on it refers to it as it is
        base = load(tmp_path / "e", None)[0].model
        base.save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="is quantised already: leave quantization out"):
            load(tmp_path / "base", DESIGN, tiny.SMALL, quantization="int8")
        tuned = add_lora(load(tmp_path / "base", DESIGN, tiny.SMALL))
        tiny.shake(tuned[0].model, 0.05, only="lora_B")
        tuned.save(tmp_path / "tuned")
        assert far(load(tmp_path / "tuned").encode(TEXTS), tuned.encode(TEXTS)) == 0


def test_a_base_that_differs_is_refused(tmp_path):
    made(lora=True).save(tmp_path / "e")
    wrong = tiny.transformer(num_hidden_layers=tiny.L)
    with torch.no_grad():
        wrong.layers[2].mlp.gate_proj.weight[0, :8] *= -1
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="holds an adapter for another base model"):
        load(tmp_path / "e", base=tmp_path / "wrong")


def test_packed_is_padded():
    expected = made(packing="never").encode(TEXTS)
    assert far(made(packing="always").encode(TEXTS), expected) <= 1e-5


def test_merge_asks(tmp_path):
    embedder = made(lora=True)
    expected = embedder.encode(TEXTS)
    with pytest.raises(ValueError, match=r"the base is quantised, .* merge\(embedder, dequantize=True\)"):
        merge(embedder)
    with pytest.raises(ValueError, match=r"an adapter on the quantised base: merge\(embedder, dequantize=True\)"):
        dequantize(embedder)
    merge(embedder, dequantize=True)
    assert not is_quantized(embedder)
    assert {type(m) for m in embedder[0].model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert far(embedder.encode(TEXTS), expected) <= 1e-5
    embedder.save(tmp_path / "full")
    again = load(tmp_path / "full")
    assert not is_quantized(again)
    assert far(again.encode(TEXTS), expected) <= 1e-5


def test_export_asks(tmp_path):
    embedder = made(design="mean-bidirectional")
    expected = embedder.encode(TEXTS)
    with pytest.raises(ValueError, match=r"quantised; call dequantize\(embedder\) first \(--dequantize\)"):
        export(embedder, tmp_path / "plain")
    dequantize(embedder)
    with pytest.raises(ValueError, match="the weights of this embedder are not quantised"):
        dequantize(embedder)
    assert export(embedder, tmp_path / "plain") <= 1e-5
    assert far(embedder.encode(TEXTS), expected) <= 1e-5


def test_commands(tmp_path, capsys):
    from mlpool.cli import main

    made(lora=True).save(tmp_path / "e")
    assert main(["merge", str(tmp_path / "e"), "-o", str(tmp_path / "m")]) == 2
    assert "--dequantize" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "e"), "-o", str(tmp_path / "m"), "--dequantize"]) == 0
    assert far(load(tmp_path / "m").encode(TEXTS), load(tmp_path / "e").encode(TEXTS)) <= 1e-5


def test_what_cannot_be_undone_is_named(monkeypatch):
    embedder = made()

    def no(weight):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(type(quantized_layers(embedder)[0][1].weight), "dequantize", no)
    with pytest.raises(ValueError, match=r"q_proj.weight \(Int8Tensor\) cannot be turned back into numbers: no such"):
        dequantize(embedder)


# --- the self-test of attention ---------------------------------------------------------------------------------------

# Weights alone; activations too, by tokens (codes flip by rounding) and in one (codes depend on the whole batch).
NOISY = {
    "weights": torchao.Int8WeightOnlyConfig(),
    "tokens": torchao.Int8DynamicActivationInt8WeightConfig(),
    "batch": torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor()),
}


def noisy(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny.transformer(family, dtype)
    torchao.quantize_(model, NOISY[kind])
    return model


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        *(("llama", kind, dtype) for kind in NOISY for dtype in (torch.float32, torch.bfloat16)),
        ("opt", "batch", torch.float32),
    ],
    ids=str,
)
def test_noise_is_known_and_hides_nothing(family, kind, dtype):
    model = noisy(kind, family, dtype)
    assert check_attention(model).causal
    with pytest.raises(AttentionCheckError, match=r"in layers 0, 1, 2, 3 the first token does not answer"):
        check_attention(model, "bidirectional")
    bidirectional(model)
    report = check_attention(model)
    assert report.bidirectional
    limit = max(layer.rounding for layer in report.layers)
    assert limit <= 0.2
    assert (limit > 1e-3) == (kind != "weights" or dtype == torch.bfloat16)  # codes of weights alone add no noise
    layer = find_layers(model)[1][1]
    forward, blocked = type(layer).forward, torch.full((64, 64), torch.finfo(dtype).min, dtype=dtype).triu(1)

    def hide(hidden, attention_mask=None, **kwargs):
        return forward(layer, hidden, attention_mask=blocked[: hidden.shape[1], : hidden.shape[1]], **kwargs)

    layer.forward = hide  # one layer that the patch does not reach
    with pytest.raises(AttentionCheckError, match="in layer 1 the first token does not answer"):
        check_attention(model)
    del layer.forward
    with pytest.raises(AttentionCheckError, match="in layers 0, 1, 2, 3 the first token answers"):
        check_attention(model, "causal")
    causal(model)


@pytest.mark.parametrize("kind", NOISY)
def test_padding_that_is_read_is_found(kind):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("mlpool_test_unmasked_int8", sdpa_attention_forward)
    model = noisy(kind)
    bidirectional(model, check=False)
    model.config._attn_implementation = "mlpool_test_unmasked_int8"
    with pytest.raises(AttentionCheckError, match=r"in layers 0.* padded right"):
        check_attention(model)


def test_noise_that_would_hide_something_is_refused():
    """Activations of three bits: nothing can be told of the attention, and that is said."""
    model = noisy("weights")
    for layer in find_layers(model)[1]:
        layer.mlp.register_forward_hook(lambda _, __, out: (out * 2 / out.abs().amax()).round() * out.abs().amax() / 2)
    with pytest.raises(AttentionCheckError, match=r"layer \d is quantised so coarsely .*take more bits"):
        check_attention(model)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_nf4(tmp_path):
    """4 bits by bitsandbytes: the same way, on a card."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes beside the card: pip install bitsandbytes")
    embedder = load(tiny.base(dtype=torch.bfloat16), DESIGN, tiny.SMALL, quantization="nf4", device="cuda")
    tiny.shake(add_lora(embedder, dropout=0.0)[0].model, 0.05, only="lora_B")
    prepare(embedder)
    columns = [embedder.preprocess(texts) for texts in (TEXTS[:3], TEXTS[4:])]
    columns = [{name: tensor.cuda() for name, tensor in column.items()} for column in columns]
    InfoNCE(embedder, mini_batch_tokens=16)(columns).backward()
    assert all(p.grad is not None for name, p in embedder.named_parameters() if "lora_B" in name)
    expected = embedder.eval().encode(TEXTS)
    embedder.save(tmp_path / "e")
    assert far(load(tmp_path / "e", device="cuda").encode(TEXTS), expected) <= 1e-2
    assert far(merge(embedder, dequantize=True).encode(TEXTS), expected) <= 3e-2
