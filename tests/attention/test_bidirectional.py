"""bidirectional and causal on every family and backend: directions, windows, saving, encoders, refusals."""

from __future__ import annotations

import logging
import sys

import models
import pytest
import torch
from both_ways import BACKENDS, MATRIX, TRAINED, apart, lone, outputs, reach, state, taken
from models import DECODERS, ENCODERS, WINDOWED, D, V, alone, build, pad, texts, transformers
from torch import Tensor, nn

from mlpool.attention import AttentionCheckError, bidirectional, causal, check_attention, is_bidirectional
from mlpool.attention.families import NO_LIMIT

flex_uncompiled = models.flex_uncompiled
pytestmark = pytest.mark.usefixtures("flex_uncompiled")


# --- families and backends --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "backend"), MATRIX)
def test_every_layer_reads_both_ways_and_padding_does_not_matter(name, backend):
    model, rows = build(name, backend), texts()
    before = lone(model, rows)
    assert not is_bidirectional(model)
    bidirectional(model)
    assert is_bidirectional(model)
    for others in ([], rows[1:]):
        assert all(layer.all() for layer in reach(model, rows[0], others))
    expected = lone(model, rows)
    assert apart(expected, before) > 1e-2
    error = max(apart(outputs(model, rows, side), expected) for side in ("left", "right", "mixed"))
    assert error <= 1e-5
    causal(model)
    assert apart(lone(model, rows), before) == 0.0
    assert not any(layer.triu(1).any() for layer in reach(model, rows[0], rows[1:]))


@pytest.mark.parametrize(("name", "backend"), TRAINED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients(name, backend, checkpointing):
    """The first token's output has a gradient with respect to the last token, the same padded and alone."""
    model, rows = build(name, backend), texts()
    bidirectional(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    weights = torch.randn(D, generator=torch.Generator().manual_seed(3))

    def gradient(batch: dict, row: int) -> Tensor:
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        kept = batch["attention_mask"][row].bool()
        (out[row][kept][0] * weights).sum().backward()
        return embeds.grad[row][kept]

    for text in (0, 2):
        expected = gradient(alone(rows[text]), 0)
        assert expected[-1].norm() > 1e-4
        for side in ("left", "right"):
            got = gradient(pad(rows, side), text)
            assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("name", "backend"), taken(DECODERS, ("eager", "sdpa")))
def test_save_and_reload(name, backend, tmp_path):
    model, rows = build(name, backend), texts()
    before = lone(model, rows)
    bidirectional(model)
    expected = lone(model, rows)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation=backend).eval()

    by_itself = (name, backend) != ("StableLM", "sdpa")
    assert is_bidirectional(again) == by_itself
    assert (apart(lone(again, rows), expected) <= 1e-5) == by_itself
    assert apart(outputs(again, rows)[1:], expected[1:]) <= 1e-5  # in a padded batch StableLM is bidirectional too
    assert (apart(outputs(again, rows, "left"), expected) <= 1e-5) == (name != "GPT-2")
    bidirectional(again)
    assert apart(lone(again, rows), expected) <= 1e-5
    assert apart(outputs(again, rows, "left"), expected) <= 1e-5

    loaded = type(model).from_pretrained(tmp_path, attn_implementation=backend).eval()
    causal(loaded)  # by its config alone it was bidirectional
    assert apart(lone(loaded, rows), before) <= 1e-5
    check_attention(loaded, "causal")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3"])
def test_serving_tools_find_their_flag(name, tmp_path):
    model = build(name)
    with bidirectional(model):
        model.save_pretrained(tmp_path)
        saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.use_bidirectional_attention is True
    assert (name == "Gemma3") or saved.is_causal is False
    assert not getattr(model.config, "use_bidirectional_attention", None)


@pytest.mark.slow
def test_flex_attention_compiled():
    with torch.compiler.set_stance("default"):
        model, eager, rows = build("Llama", "flex_attention"), build("Llama"), texts()
        bidirectional(eager)
        bidirectional(model, check=False)  # every shape is compiled anew, which takes 10 seconds and more
        assert apart(outputs(model, rows, "left"), lone(eager, rows)) <= 1e-5


# --- sliding windows --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "backend"), taken(WINDOWED, BACKENDS))
def test_sliding_windows(name, backend, tmp_path):
    rows = texts()
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    for choice in ("keep", "full"):
        model = build(name, backend, among=WINDOWED)
        model.save_pretrained(tmp_path)  # the library notes class and dtype in the config
        before = state(model)
        bidirectional(model, sliding_window=choice)
        width = 9 if choice == "full" else 2 if name == "Gemma3" else 4  # Gemma3: 4 // 2 + 1, the end excluded
        for others in ([], rows[1:]):
            layers = reach(model, rows[0], others)
            assert torch.equal(layers[0], distance <= width)
            assert all(torch.equal(layer, distance <= width) or layer.all() for layer in layers)
        assert apart(outputs(model, rows, "mixed"), lone(model, rows)) <= 1e-5
        model.save_pretrained(tmp_path / choice)
        again = type(model).from_pretrained(tmp_path / choice, attn_implementation=backend).eval()
        assert apart(lone(again, rows), lone(model, rows)) <= 1e-5
        bidirectional(again, sliding_window=choice)
        assert apart(lone(again, rows), lone(model, rows)) <= 1e-5
        causal(model)
        assert state(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_gemma3_is_as_if_constructed_bidirectional(backend):
    patched, rows = build("Gemma3", backend, among=WINDOWED), texts()
    bidirectional(patched)
    constructed = build("Gemma3", backend, among=WINDOWED, use_bidirectional_attention=True)
    assert patched.config.sliding_window == constructed.config.sliding_window == 3
    expected = lone(constructed, rows)
    assert apart(lone(patched, rows), expected) == 0.0
    before = vars(constructed.config).copy()
    bidirectional(constructed)  # it is already: its window is not halved again
    assert vars(constructed.config) == before
    assert apart(lone(constructed, rows), expected) == 0.0


def test_a_window_of_full_reach_is_written_as_such():
    model = build("Mistral", among=WINDOWED)
    bidirectional(model, sliding_window="full")
    assert model.config.sliding_window is None
    model = build("Qwen3", among=WINDOWED)
    bidirectional(model, sliding_window="full")
    assert model.config.sliding_window == NO_LIMIT
    assert model.config.layer_types[0] == "sliding_attention"


# --- encoders and refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoders_are_left_as_they_are(name, backend, caplog):
    model = build(name, backend)
    before = state(model)
    from mlpool.pooling.base import log_once

    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "mlpool"):
        with bidirectional(model):
            assert state(model) == before
        bidirectional(model)
    # transformers warns of tiny configs in the same log, once a process
    said = [record.getMessage() for record in caplog.records if record.name == "mlpool"]
    assert len(said) == 1
    assert "reads both directions by itself: nothing is changed" in said[0]
    assert is_bidirectional(model)
    assert check_attention(model).bidirectional
    with pytest.raises(ValueError, match=r"is an encoder.*no causal form"):
        causal(model)


def test_alibi_is_said():
    from mlpool.pooling.base import log_once

    log_once.cache_clear()
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("mlpool").addHandler(handler)
    try:
        for backend in ("eager", "sdpa"):
            model, rows = build("Falcon", backend, alibi=True), texts()
            bidirectional(model)
            assert apart(outputs(model, rows, "left"), lone(model, rows)) <= 1e-5
    finally:
        logging.getLogger("mlpool").removeHandler(handler)
    assert len(log) == 1
    assert "ALiBi" in log[0]


LLAMA4 = {**models.HEAD, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4}


def test_families_that_cannot():
    model = transformers.Llama4TextModel(transformers.Llama4TextConfig(**LLAMA4)).eval()
    before = state(model)
    with pytest.raises(ValueError, match=r"llama4_text cannot be made bidirectional: .*chunk"):
        bidirectional(model)
    assert state(model) == before
    sizes = {"vocab_size": V, "hidden_size": D, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    neo = transformers.GPTNeoConfig(**sizes, attention_types=[[["global"], 2]], max_position_embeddings=64)
    with pytest.raises(ValueError, match="gpt_neo cannot be made bidirectional"):
        bidirectional(transformers.GPTNeoModel(neo))


def test_an_unknown_family_is_tried_and_undone():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=4)
    model = transformers.MambaModel(config).eval()
    before = state(model)
    with pytest.raises(AttentionCheckError, match=r"mamba on .*layers 0, 1 the first token does not answer"):
        bidirectional(model)
    assert state(model) == before
    torch.manual_seed(0)
    cohere = transformers.Cohere2Model(transformers.Cohere2Config(**models.HEAD, sliding_window=40)).eval()
    bidirectional(cohere)
    assert is_bidirectional(cohere)


def test_encoder_decoders():
    config = transformers.T5Config(vocab_size=V, d_model=D, num_layers=2, num_heads=2, d_kv=16, d_ff=48)
    for refuse in (bidirectional, causal, is_bidirectional, check_attention):
        with pytest.raises(ValueError, match="encoder-decoder"):
            refuse(transformers.T5Model(config))
    bidirectional(transformers.T5EncoderModel(config).eval())  # an encoder


def test_unknown_backends():
    for name in ("paged|sdpa", "my_attention"):
        model = build("Llama")
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match=r"unknown attention backend .*eager, sdpa, flex_attention"):
            bidirectional(model)


def test_backends_that_a_family_cannot_use():
    model = build("Gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"gemma2 cannot run on sdpa: .*soft-cap.*attn_implementation='eager'"):
        bidirectional(model)
    model = build("Gemma2", attn_logit_softcapping=None)
    model.config._attn_implementation = "sdpa"
    bidirectional(model)
    for backend in ("flex_attention", "mlpool_packed"):
        model = build("Falcon")
        model.config._attn_implementation = backend
        with pytest.raises(ValueError, match=f"falcon cannot run on {backend}: .*registry"):
            bidirectional(model)


def test_bad_arguments(monkeypatch):
    model = build("Llama")
    with pytest.raises(ValueError, match=r"sliding_window must be one of \('keep', 'full'\), got 'half'"):
        bidirectional(model, sliding_window="half")
    with pytest.raises(ValueError, match="no list of layers"):
        bidirectional(nn.Linear(2, 2))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    for call in (bidirectional, causal):
        with pytest.raises(ImportError, match=r"transformers 5\.16\.2 is too old.*5\.17.*mlpool\[st\]"):
            call(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mlpool\[st\]'"):
        bidirectional(model)


def test_multimodal_models_are_refused():
    text = {**DECODERS["Gemma3"][1]}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 14, "patch_size": 14})
    model = transformers.Gemma3Model(config).eval()
    with pytest.raises(ValueError, match=r"multimodal.*Gemma3TextModel"):
        bidirectional(model)
    bidirectional(model.language_model)
