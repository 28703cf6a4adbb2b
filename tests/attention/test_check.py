"""The self-test: it must find each silent fault, name the layer, and leave no trace."""

from __future__ import annotations

import models
import pytest
import torch
from models import DECODERS, REFUSED, build, pad, texts, transformers
from torch import nn

from mlpool.attention import (
    AttentionCheckError,
    bidirectional,
    causal,
    check_attention,
    is_bidirectional,
    pack,
    unpack,
)  # fmt: skip
from mlpool.taps import find_layers

flex_uncompiled = models.flex_uncompiled
pytestmark = pytest.mark.usefixtures("flex_uncompiled")
CASES = [(name, backend) for name in DECODERS for backend in ("eager", "sdpa") if (name, backend) not in REFUSED]


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    return next(m for m in find_layers(model)[1][layer].modules() if "is_causal" in vars(m))


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sound_models_pass_both_ways(name, backend, dtype):
    model = build(name, backend, dtype=dtype)
    with pytest.raises(AttentionCheckError, match="as a bidirectional model: in layers 0, 1, 2 the first token does"):
        check_attention(model, "bidirectional")
    bidirectional(model, check=False)
    report = check_attention(model)
    assert (report.backend, report.dtype, len(report.layers)) == (backend, dtype, 3)
    assert report.bidirectional
    assert not report.causal
    assert report.padding_error <= {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    with pytest.raises(AttentionCheckError, match="as a causal model: in layers 0, 1, 2 the first token answers"):
        check_attention(model, "causal")
    causal(model)
    assert check_attention(model, "causal").causal
    if name != "GPT-2":  # left padding is wrong there unless positions are given, as `expect="causal"` does
        assert check_attention(model).causal


def test_autocast_and_float64():
    model = build("Llama", "sdpa")
    bidirectional(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert check_attention(model).dtype == torch.bfloat16
    assert check_attention(model.double()).padding_error <= 1e-6


@pytest.mark.parametrize("name", ["Llama", "StableLM", "GPT-2", "Gemma3"])
def test_the_packed_backend(name):
    model, rows = build(name, "sdpa"), texts()
    pack(model)
    bidirectional(model)
    assert list(check_attention(model).layers[0].answers) == ["first packed", "last packed"]
    with pytest.raises(AttentionCheckError, match=f"{model.config.model_type} on mlpool_packed"):
        check_attention(model, "causal")
    expected = model(**pad(rows)).last_hidden_state
    unpack(model)
    assert is_bidirectional(model)
    mask = pad(rows)["attention_mask"].bool()
    assert (model(**pad(rows)).last_hidden_state - expected)[mask].abs().max() <= 1e-5
    alone = build(name)
    alone.set_attn_implementation("mlpool_packed")  # without `pack`: padded batches
    bidirectional(alone)
    assert "left-padded" in check_attention(alone).layers[0].answers


def test_only_layer_0_patched():
    """The tokens' influence alone would pass: later layers inherit it."""
    model = build("Llama", "sdpa")
    attention_of(model, 0).is_causal = False
    with pytest.raises(AttentionCheckError, match=r"llama on sdpa \(float32\).*in layers 1, 2 the first .*\(unpadded"):
        check_attention(model, "bidirectional")
    assert not is_bidirectional(model)


def test_module_flags_alone_are_undone_by_padding():
    model = build("Llama", "sdpa")
    for layer in range(3):
        attention_of(model, layer).is_causal = False
    with pytest.raises(AttentionCheckError) as caught:
        check_attention(model, "bidirectional")
    assert "left-padded text" in str(caught.value)
    assert "unpadded text" not in str(caught.value)


@pytest.mark.parametrize("name", ["StableLM"])
def test_config_flag_alone_leaves_unpadded_batches_causal(name):
    model = build(name, "sdpa")
    model.config.is_causal = False
    with pytest.raises(AttentionCheckError, match=r"layers 0, 1, 2 .*\(unpadded text\).*Known of stablelm: its attent"):
        check_attention(model)
    bidirectional(model)


def test_one_layer_causal():
    model = build("OPT", "sdpa")
    bidirectional(model)
    layer = find_layers(model)[1][1]
    forward = type(layer).forward
    blocked = torch.full((64, 64), torch.finfo(torch.float32).min).triu(1)

    def hide(hidden, attention_mask=None, **kwargs):
        return forward(layer, hidden, attention_mask=blocked[: hidden.shape[1], : hidden.shape[1]], **kwargs)

    layer.forward = hide
    with pytest.raises(AttentionCheckError, match="in layer 1 the first token does not answer"):
        check_attention(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_that_is_read(dtype):
    """An attention function without its mask function leaves padding unmasked."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register("mlpool_test_unmasked", sdpa_attention_forward)
    model = build("Llama", dtype=dtype)
    bidirectional(model, check=False)
    model.config._attn_implementation = "mlpool_test_unmasked"
    with pytest.raises(AttentionCheckError, match=r"llama on mlpool_test_unmasked .*in layers 0.* padded right"):
        check_attention(model)


def test_positions_that_count_padding():
    model = build("GPT-2", "sdpa")
    model.config.is_causal = False
    with pytest.raises(AttentionCheckError, match=r"input of layer 0 differs .*padded left.*gpt2: .*position_ids"):
        check_attention(model)
    assert is_bidirectional(model)
    bidirectional(model)


def test_a_failed_check_undoes_the_patch(monkeypatch):
    model = build("Llama")
    layer = find_layers(model)[1][2]
    forward = type(layer).forward
    blocked = torch.full((64, 64), torch.finfo(torch.float32).min).triu(1)

    def hide(hidden, attention_mask=None, **kwargs):
        return forward(layer, hidden, attention_mask=blocked[: hidden.shape[1], : hidden.shape[1]], **kwargs)

    layer.forward = hide
    with pytest.raises(AttentionCheckError, match="in layer 2 the first"):
        bidirectional(model)
    assert "is_causal" not in vars(model.config)
    assert "forward" not in vars(model)
    bidirectional(model, check=False)
    assert not is_bidirectional(model)


def test_a_forward_that_fails():
    model = build("Llama")
    find_layers(model)[1][1].mlp = nn.Linear(3, 3)
    with pytest.raises(AttentionCheckError, match="llama on eager: the forward of the self-test failed behind layer 0"):
        check_attention(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_cannot_be_seen():
    """As in a layer that was compiled before: it runs without the hooks that came later."""
    model = build("Llama")
    layer = find_layers(model)[1][1]
    layer._compiled_call_impl = layer.forward
    with pytest.raises(AttentionCheckError, match=r"of 3 layers of LlamaModel, \[0, 2\] ran where the self-test"):
        check_attention(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_it_leaves_no_trace(training):
    model = build("Llama", attention_dropout=0.5, use_cache=True).train(training)
    find_layers(model)[1][1].eval()
    bidirectional(model, check=False)
    modes = [module.training for module in model.modules()]
    config, keys = vars(model.config).copy(), [sorted(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    check_attention(model)
    assert is_bidirectional(model)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    assert config == vars(model.config)
    assert keys == [sorted(vars(module)) for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_costs_two_short_forwards():
    model = build("Llama")
    bidirectional(model, check=False)
    shapes = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    check_attention(model)
    handle.remove()
    assert shapes == [(12, 5), (40, 8)]  # a copy of the text for each change of its last token


def test_checkpointing_on():
    model = build("Llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    bidirectional(model)
    assert model.is_gradient_checkpointing
    assert model.training


def test_unknown_expectation():
    with pytest.raises(ValueError, match=r"expect must be one of \('bidirectional', 'causal'\), got 'both'"):
        check_attention(build("Llama"), "both")


def saturate(model: nn.Module) -> nn.Module:
    """Every token reads one other alone: the second weight is below 1e-7."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(30)
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", ["eager", "sdpa", "mlpool_packed"])
def test_saturated_attention_is_no_causal_attention(backend, seed):
    model = saturate(build("Llama", "sdpa" if backend == "mlpool_packed" else backend, attention_bias=bool(seed % 2)))
    if seed > 1:
        model.layers = model.layers[:2]
        model.config.num_hidden_layers = 2
    if backend == "mlpool_packed":
        pack(model, check=False)
    assert check_attention(model, "causal").causal
    bidirectional(model)
    assert check_attention(model).bidirectional


def test_flags_that_say_nothing_are_measured():
    """CLIP's text model is causal, hands is_causal=True to its layers, and none of its modules says so."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    model = transformers.CLIPTextModel(config).eval()
    assert not is_bidirectional(model)
    assert causal(model) is model
    with pytest.raises(AttentionCheckError, match=r"as a bidirectional model: in layers 0, 1 the first .*\(unpadded"):
        bidirectional(model)
    assert "forward" not in vars(find_layers(model)[0])


def test_encoders_that_cannot_be_measured_are_believed():
    model = build("BERT")
    layer = find_layers(model)[1][1]
    layer._compiled_call_impl = layer.forward
    bidirectional(model, check=False)
    assert "forward" not in vars(find_layers(model)[0])
    with pytest.raises(ValueError, match="bert is an encoder"):
        causal(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = build("Llama")
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = bad
    for test in (bidirectional, check_attention, is_bidirectional):
        with pytest.raises(AttentionCheckError, match=r"NaN or infinite weights: layers\.1\.mlp\.down_proj\.weight; a"):
            test(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(bad)
    with pytest.raises(AttentionCheckError, match=r"embed_tokens\.weight, .* and \d+ more"):
        bidirectional(model)


def test_an_overflow_of_finite_weights_is_named():
    model = build("Llama", dtype=torch.float16)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(
        AttentionCheckError, match="output of layer 0 is NaN or infinite in float16, though all weights"
    ):
        check_attention(model)


def test_the_same_batch_twice_is_the_same():
    model = build("Llama")
    bidirectional(model)
    one, two = check_attention(model), check_attention(model)
    assert one == two
    assert pad(texts())["input_ids"].equal(pad(texts())["input_ids"])
