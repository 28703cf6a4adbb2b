"""bidirectional undone, wrapped, copied and reloaded: everything is as before, or patched on its own."""

from __future__ import annotations

import copy
import inspect
import pickle

import models
import pytest
import torch
from both_ways import apart, lone, outputs, run, state
from models import DECODERS, WINDOWED, D, L, V, alone, build, pad, texts, transformers
from torch import nn

from mlpool.attention import AttentionCheckError, bidirectional, causal, check_attention, is_bidirectional
from mlpool.attention.families import attentions, window_of
from mlpool.taps import Taps, find_layers

flex_uncompiled = models.flex_uncompiled
pytestmark = pytest.mark.usefixtures("flex_uncompiled")


@pytest.mark.parametrize("name", DECODERS)
def test_everything_is_restored(name):
    model = build(name)
    before = state(model)
    rows = texts()
    expected = outputs(model, rows)
    with bidirectional(model) as inside:
        assert inside is model
        assert (model.config.is_causal is False) if name != "Gemma3" else model.config.use_bidirectional_attention
        flags = [m.is_causal for m in model.modules() if "is_causal" in vars(m)]
        assert len(flags) == L
        assert not any(flags)
    assert state(model) == before
    assert apart(outputs(model, rows), expected) == 0.0
    handle = bidirectional(model, check=False)
    assert handle.model is model
    assert is_bidirectional(model)
    assert causal(model) is model
    assert state(model) == before
    causal(model)  # harmless
    assert state(model) == before


def reloaded(model: nn.Module, folder) -> nn.Module:
    """Saved as it stands, and loaded."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("again", [True, False], ids=["bidirectional again", "as loaded"])
@pytest.mark.parametrize("name", DECODERS)
def test_causal_after_a_reload_is_causal_at_the_first_call(name, again, tmp_path):
    model, rows = build(name), texts()
    expected = outputs(model, rows)
    bidirectional(model, check=False)
    model = reloaded(model, tmp_path)
    if again:
        bidirectional(model, check=False)
    assert causal(model) is model
    check_attention(model, "causal")
    assert apart(outputs(model, rows), expected) <= 1e-6


def test_windows_after_a_reload(tmp_path):
    """Gemma3's own mode halves the window once, at construction."""
    model, rows = build("Gemma3", among=WINDOWED), texts()
    windows = [m.sliding_window for m in attentions(model)]
    causal_states = outputs(model, rows)
    bidirectional(model)
    halved, expected = [m.sliding_window for m in attentions(model)], outputs(model, rows)
    model = reloaded(model, tmp_path)
    bidirectional(model)
    assert [m.sliding_window for m in attentions(model)] == halved
    assert apart(outputs(model, rows), expected) <= 1e-6
    causal(model)
    assert [m.sliding_window for m in attentions(model)] == windows
    assert apart(outputs(model, rows), causal_states) <= 1e-6


def test_a_block_on_a_model_that_was_saved_bidirectional_leaves_it_so(tmp_path):
    model = build("Llama")
    bidirectional(model, check=False)
    model = reloaded(model, tmp_path)
    with bidirectional(model):
        pass
    assert is_bidirectional(model)
    with bidirectional(model):
        causal(model)
    assert not is_bidirectional(model)


def test_an_adapter_that_plain_peft_loads_is_causal_and_measured_so(tmp_path):
    import peft

    model = peft.get_peft_model(build("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    bidirectional(model)
    assert is_bidirectional(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("Llama"), tmp_path)
    assert not is_bidirectional(loaded)
    bidirectional(loaded)
    assert is_bidirectional(loaded)


def test_a_model_on_meta():
    with torch.device("meta"):
        model = transformers.LlamaModel(build("Llama").config)
    for test in (bidirectional, check_attention, is_bidirectional):
        with pytest.raises(ValueError, match="LlamaModel is on the meta device, so nothing can be tried on it"):
            test(model)
    assert "is_causal" not in vars(model.config)
    bidirectional(model, check=False)
    model.to_empty(device="cpu").load_state_dict(build("Llama").state_dict())
    model.rotary_emb = build("Llama").rotary_emb
    assert check_attention(model).bidirectional


def test_windows_that_differ_by_layer():
    """The config then refuses to name one window, and the library has no causal model that runs so."""
    windows = {0: {"sliding_window": 9}, 1: {"sliding_window": 4}, 2: {"sliding_window": None}}
    config = transformers.MistralConfig(**models.HEAD, per_layer_config=windows)
    assert window_of(config) == 4
    with pytest.raises(ValueError, match="windows of mistral differ by layer; they can only be kept"):
        bidirectional(transformers.MistralModel(config), sliding_window="full")


def test_an_error_inside_the_block_undoes_too():
    model = build("Llama")
    with pytest.raises(KeyError), bidirectional(model):
        raise KeyError
    assert not is_bidirectional(model)


def test_a_second_call_checks_again_and_does_not_own_the_patch():
    model = build("Qwen3", among=WINDOWED)
    with bidirectional(model):
        with bidirectional(model):
            pass
        assert is_bidirectional(model)
        with pytest.raises(ValueError, match=r"already, with sliding_window='keep'.*causal\(model\)"):
            bidirectional(model, sliding_window="full")
        find_layers(model)[1][1].self_attn.is_causal = True
        model.config.is_causal = True
        with pytest.raises(AttentionCheckError):
            bidirectional(model)
    assert not is_bidirectional(model)


def test_only_this_instance_changes():
    one, other = build("Llama"), build("Llama")
    bidirectional(one)
    assert not is_bidirectional(other)
    assert not is_bidirectional(build("Llama"))
    assert is_bidirectional(one)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
def test_copies_are_patched_on_their_own(how):
    model, rows = build("GPT-2"), texts()
    bidirectional(model)
    other = how(model)
    assert apart(outputs(other, rows, "left"), lone(model, rows)) <= 1e-5
    causal(other)
    assert "is_causal" not in vars(other.config)
    assert not is_bidirectional(other)
    assert is_bidirectional(model)


def test_the_signature_stays():
    model = build("Llama")
    before = inspect.signature(model.forward)
    bidirectional(model)
    assert inspect.signature(model.forward) == before


def test_models_with_a_head():
    transformers.logging.set_verbosity_error()
    model = build("Llama", head="ForCausalLM")
    bidirectional(model)
    batch = pad(texts())
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 8] = 5
    assert (model(**batch).logits - model(**changed).logits)[0, 0].abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"past_key_values were passed to a bidirectional LlamaModel.*causal\(model\)"):
        model.generate(batch["input_ids"][:1], max_new_tokens=2)


def test_no_cache_is_kept_or_taken():
    model = build("Llama", use_cache=True)
    batch = alone(texts()[0])
    assert model(**batch).past_key_values is not None
    bidirectional(model)
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is None
    assert model(batch["input_ids"], batch["attention_mask"]).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values"):
        model(**batch, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="past_key_values"):
        model(batch["input_ids"], batch["attention_mask"], None, transformers.DynamicCache())
    causal(model)
    assert model(**batch).past_key_values is not None


def test_gpt2_positions_given_by_hand_are_kept():
    model, rows = build("GPT-2"), texts()
    bidirectional(model)
    batch = pad(rows, "left")
    late = run(model, batch, position_ids=torch.arange(9).expand(3, 9) + 1)
    assert (late - run(model, batch)).abs().max() > 1e-2


def test_peft(tmp_path):
    import peft

    rows = texts()
    base = build("Llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    with bidirectional(model):
        assert is_bidirectional(model)
        assert is_bidirectional(base)
        expected = lone(model, rows)
        assert apart(outputs(model, rows, "left"), expected) <= 1e-5
        model.save_pretrained(tmp_path)
    assert not is_bidirectional(model)
    again = peft.PeftModel.from_pretrained(build("Llama"), tmp_path).eval()
    assert not is_bidirectional(again), "the adapter's save came to hold the base's config: say so in the docs"
    bidirectional(again)
    assert apart(lone(again, rows), expected) <= 1e-5


def test_a_sentence_transformer(tmp_path):
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build("Llama").save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w3")
    tokenizer.save_pretrained(tmp_path)
    inner = Transformer(str(tmp_path))
    model = st.SentenceTransformer(modules=[inner, Pooling(D, pooling_mode="mean")], device="cpu")
    sentences = ["w4 w5 w6 w7 w8", "w9 w10"]
    before = model.encode(sentences)
    with bidirectional(model):
        assert is_bidirectional(model)
        padded = model.encode(sentences)
        each = [model.encode(sentence) for sentence in sentences]
        assert abs(padded - each).max() <= 1e-5
        assert abs(padded - before).max() > 1e-3
    assert abs(model.encode(sentences) - before).max() <= 1e-6


def test_taps_above_and_below():
    model, rows = build("Llama"), texts()
    bidirectional(model)
    batch = pad(rows)
    expected = model(**batch, output_hidden_states=True).hidden_states[-1][0, 8]
    with Taps(model) as taps:
        model(**batch)
        assert is_bidirectional(model)  # looked at between a forward and its take
        assert torch.equal(taps.take()[0, -1], expected)
    causal(model)
    with Taps(model) as taps:
        bidirectional(model)
        model(**batch)
        assert torch.equal(taps.take()[0, -1], expected)
        causal(model)
    assert "forward" not in vars(model)
    bidirectional(model)
    taps = Taps(model)
    causal(model)  # out of order: what is left beneath the taps does nothing
    assert model(**batch, use_cache=True).past_key_values is not None
    taps.detach()
    assert not is_bidirectional(model)


def test_compiled():
    model, rows = build("GPT-2", "sdpa"), texts()
    bidirectional(model)
    batch = pad(rows, "left")
    with torch.compiler.set_stance("default"):
        got = run(torch.compile(model, backend="eager"), batch)
    assert (got - run(model, batch)).abs().max() <= 1e-5
