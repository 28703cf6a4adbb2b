"""Tokens to states: padding side, packing, what is pooled, dtype and attention of the base, threads and copies."""

import copy
import logging
import pickle
import threading

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from tiny import DESIGNS, TEXTS, D, L, V

from mlpool.attention import unpack
from mlpool.embedder import load
from mlpool.embedder.backbone import Backbone
from mlpool.pooling.base import log_once

NEVER = pytest.mark.parametrize("packing", ["never", "auto"])


def roll(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch, padded on the left."""
    gaps = (1 - features["attention_mask"]).sum(1).tolist()
    rolled = {name: [row.roll(gap) for row, gap in zip(t, gaps, strict=True)] for name, t in features.items()}
    return {name: torch.stack(rows) for name, rows in rolled.items()}


def embed(embedder, features: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return embedder(dict(features))["sentence_embedding"]


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=atol, rtol=0)


# --- padding ----------------------------------------------------------------------------------------------------------


@NEVER
@pytest.mark.parametrize(
    ("design", "family"),
    [(design, "qwen2") for design in DESIGNS]
    + [(design, family) for design in ("eos-causal", "multi-layer-bidirectional") for family in ("gpt2", "opt")]
    + [("multi-layer-bidirectional", "bert"), ("mean-bidirectional", "roberta"), ("last-layer-bidirectional", "bert")],
)
def test_padding_side_does_not_matter(design, family, packing):
    embedder = tiny.embedder(design, family, packing=packing)
    features = embedder.preprocess(TEXTS)
    assert features["attention_mask"][:, 0].all()
    assert not features["attention_mask"].all()
    right, left = embed(embedder, features), embed(embedder, roll(features))
    alone = torch.cat([embed(embedder, embedder.preprocess([text])) for text in TEXTS])
    close(right, alone)
    close(left, alone)
    close(embedder.encode(TEXTS), alone)
    assert embedder[0].packed == (packing == "auto")


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizers_padding_side_does_not_matter(side, tmp_path):
    tokenizer = tiny.tokenizer("bos", padding_side=side, truncation_side=side, pad_token="<pad>")
    embedder = tiny.embedder("eos-causal")
    expected = tiny.embedder("eos-causal", frame="bos").encode(TEXTS)
    embedder.tokenizer = tokenizer
    assert embedder.tokenizer is embedder[0].tokenizer is tokenizer
    close(embedder.encode(TEXTS), expected)


def test_pad_token_without_resizing():
    embedder = tiny.embedder(family="llama")
    assert embedder[0].model.get_input_embeddings().weight.shape == (V, D)
    assert len(embedder.tokenizer) == len(tiny.tokenizer())
    assert embedder.tokenizer.pad_token == "</s>"


def test_pad_token_that_the_model_does_not_have():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(V - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == V
    backbone = Backbone(tiny.transformer(), tokenizer, "mean-causal", packing="never")
    assert backbone(backbone.preprocess(["a", "a b c"]))["token_embeddings"].shape[0] == 2
    tokenizer.eos_token = "[PAD]"
    with pytest.raises(ValueError, match=rf"'\[PAD\]' \({V}\) around a text, and the model has embeddings of {V}"):
        Backbone(tiny.transformer(), tokenizer, "mean-causal")


# --- what is pooled ---------------------------------------------------------------------------------------------------


@NEVER
@pytest.mark.parametrize("design", ["mean-bidirectional", "layer-weights-bidirectional", "last-layer-bidirectional"])
@pytest.mark.parametrize("bos", [True, False])
def test_prompt_and_bos_are_read_but_not_pooled(design, packing, bos):
    prompt = "Instruct: how many\nQ: "
    embedder = tiny.embedder(design, frame="bos", packing=packing, include_prompt=False, include_bos=bos)
    tokens = embedder[0].token_ids(TEXTS, prompt)
    pool = embedder[1].pool
    expected = []
    for ids, skipped in zip(tokens.ids, tokens.skipped, strict=True):
        with torch.no_grad():  # the model reads all tokens, the pool those behind the prompt
            call = {"input_ids": torch.from_numpy(ids).long()[None], "attention_mask": torch.ones(1, len(ids)).long()}
            states = unpacked(embedder)(**call, output_hidden_states=True).hidden_states
            kept = [state[:, skipped:] for state in states]
            if design == "layer-weights-bidirectional":
                expected.append(pool(kept, torch.ones(1, len(ids) - skipped)))
            else:
                expected.append(pool(kept[-1], torch.ones(1, len(ids) - skipped)))
    expected = torch.cat(expected)
    close(embedder.encode(TEXTS, prompt=prompt), expected)
    close(embed(embedder, embedder.preprocess(TEXTS, prompt=prompt)), expected)
    close(embed(embedder, roll(embedder.preprocess(TEXTS, prompt=prompt))), expected)
    embedder.set_pooling_include_prompt(True)
    assert embedder[0].get_config_dict()["include_prompt"] is True
    assert abs(embedder.encode(TEXTS, prompt=prompt) - expected.numpy()).max() > 1e-3


def unpacked(embedder):
    """A copy of the transformers model without packing, still with the design's attention."""
    return unpack(copy.deepcopy(embedder[0].model))


@pytest.mark.parametrize("bos", [True, False])
def test_bos_without_a_prompt(bos):
    embedder = tiny.embedder("mean-causal", frame="bos", include_bos=bos)
    ids = torch.from_numpy(embedder[0].token_ids(["a b"]).ids[0]).long()[None]
    with torch.no_grad():
        state = unpacked(embedder)(input_ids=ids).last_hidden_state[0]
    close(embedder.encode("a b"), F.normalize(state[0 if bos else 1 :].mean(0), dim=0))


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_always_on_a_model_that_cannot():
    embedder = tiny.embedder("mean-causal", packing="always")
    embedder[0].model.set_attn_implementation = None  # so that no other attention reaches it
    embedder[0].model._can_set_attn_implementation = lambda: False
    with pytest.raises(ValueError, match="qwen2 cannot run packed: its attention does not go through"):
        embedder.encode(TEXTS)


def test_a_model_that_cannot_pack_says_so_once(caplog):
    log_once.cache_clear()
    expected = tiny.embedder("mean-causal").encode(TEXTS)
    with caplog.at_level(logging.WARNING, "mlpool"):
        for _ in range(2):
            embedder = tiny.embedder("mean-causal")
            embedder[0].model._can_set_attn_implementation = lambda: False
            for _ in range(2):
                close(embedder.encode(TEXTS), expected)
    said = [record.getMessage() for record in caplog.records if "padding" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("running with padding, which costs time where texts differ in length: qwen2 cannot run")
    assert not embedder[0].packed


def test_a_family_whose_own_code_cannot_pack_runs_padded(caplog, tmp_path):
    """Found when it is packed, not when it encodes: its dynamic mask raises an IndexError on a row of texts."""
    log_once.cache_clear()
    torch.manual_seed(0)
    transformers.DogeModel(transformers.DogeConfig(**tiny.GATED)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "mlpool"):
        embedder = load(tmp_path, "eos-causal", device="cpu")
        embeddings = embedder.encode(TEXTS)
    close(embeddings, load(tmp_path, "eos-causal", device="cpu", packing="never").encode(TEXTS))
    assert not embedder[0].packed
    assert "running with padding" in caplog.text
    assert "doge cannot run packed: a trial of two short texts failed" in caplog.text
    with pytest.raises(ValueError, match="doge cannot run packed"):
        load(tmp_path, "eos-causal", device="cpu", packing="always").encode(TEXTS)


@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "multi-layer-causal"])
def test_forwards_leave_the_model_as_it_was(design):
    embedder = tiny.embedder(design)
    embedder.encode("a")
    before = dict(embedder[0].model.__dict__)
    for _ in range(3):
        embedder.encode("a")
    assert embedder[0].model.__dict__ == before


def test_packing_follows_what_was_asked():
    embedder = tiny.embedder("mean-causal", packing="never")
    assert not embedder[0].packed
    embedder.encode("a")
    assert not embedder[0].packed
    embedder[0].packing = "always"
    embedder.encode("a")
    assert embedder[0].packed
    embedder[0].packing = "never"
    embedder.encode("a")
    assert not embedder[0].packed


# --- the base model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_base(dtype):
    embedder = tiny.embedder(base_dtype=dtype)
    assert {parameter.dtype for parameter in embedder.parameters()} == {dtype}
    assert embedder.dtype == embedder.encode("a", convert_to_tensor=True).dtype == dtype
    embedding = embedder.encode(TEXTS)
    assert embedding.dtype.kind == "f"
    exact = tiny.embedder(base_dtype=torch.float64)
    exact.load_state_dict({name: t.double() for name, t in embedder.state_dict().items()})
    limit = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-6}[dtype]
    assert abs(embedding.astype("float64") - exact.encode(TEXTS)).max() < limit


def test_dtype_that_was_asked_for():
    assert load(tiny.base(), 5, pooler=tiny.SMALL, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tiny.base(dtype=torch.bfloat16), 1, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "eos-causal"])
def test_attention_backend(backend, design):
    embedder = tiny.embedder(design, attn_implementation=backend, packing="never")
    assert embedder[0].model.config._attn_implementation == embedder[0].attn_implementation == backend
    close(embedder.encode(TEXTS), tiny.embedder(design).encode(TEXTS))


def test_under_autocast():
    embedder = tiny.embedder()
    exact = embedder.encode(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(embedder.encode(TEXTS) - exact).max() < 3e-2
    close(embedder.encode(TEXTS), exact)


def test_limit_of_tokens():
    assert tiny.embedder("eos-causal").max_seq_length == 128
    roberta = tiny.embedder("mean-bidirectional", "roberta")
    assert roberta.max_seq_length == 65  # one position is the padding's
    assert roberta.encode("x" * 200).shape == (D,)
    short = Backbone(tiny.transformer(), tiny.tokenizer(model_max_length=50), "eos-causal")
    assert short.max_seq_length == 50
    assert load(tiny.base(), 1, max_seq_length=7).max_seq_length == 7


def test_model_that_is_bidirectional_already_becomes_causal(tmp_path):
    saved = tiny.transformer("llama")
    saved.config.is_causal = False
    saved.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    close(load(tmp_path, "eos-causal").encode(TEXTS), load(tiny.base("llama"), "eos-causal").encode(TEXTS))


def test_encoder_half_of_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": D, "d_kv": 16, "d_ff": 48, "num_layers": L, "num_decoder_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=V, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **sizes)
    model = transformers.T5Model(config).eval()
    model.save_pretrained(tmp_path)
    tiny.tokenizer("eos", pad_token="<pad>").save_pretrained(tmp_path)
    embedder = load(tmp_path, "mean-bidirectional")
    features = embedder.preprocess(TEXTS)
    with torch.no_grad():
        states = model.encoder(**{name: features[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    mask = features["attention_mask"][:, :, None]
    close(embedder.encode(TEXTS), F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    embedder.save(tmp_path / "saved")
    close(load(tmp_path / "saved").encode(TEXTS), embedder.encode(TEXTS))


# --- one embedder in many hands ---------------------------------------------------------------------------------------


def test_threads():
    embedder = tiny.embedder()
    expected, got = embedder.encode(TEXTS * 3), []
    fresh = tiny.embedder()  # so that the threads also pack it

    def work():
        try:
            got.append(fresh.encode(TEXTS * 3, token_budget=40))
        except Exception as error:
            got.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for one in got:
        close(one, expected)


@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "eos-causal"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda embedder: pickle.loads(pickle.dumps(embedder))])
def test_copies(design, copied):
    embedder = tiny.embedder(design)
    expected = embedder.encode(TEXTS)
    other = copied(embedder)
    close(other.encode(TEXTS), expected)
    tiny.shake(other[0])
    assert abs(other.encode(TEXTS) - expected).max() > 1e-2
    close(embedder.encode(TEXTS), expected)  # nothing is shared


def test_gradients_reach_base_and_pool():
    embedder = tiny.embedder().train()
    features = embedder.preprocess(TEXTS)
    embedder(features)["sentence_embedding"][:, 0].sum().backward()
    without = [name for name, p in embedder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert embedder.encode("a").shape == (D,)  # and the encoding that follows holds no graph


def test_a_saved_design_is_needed_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"lacks backbone_config.json or its design; it is not a saved embedder"):
        Backbone.load(str(tmp_path))
