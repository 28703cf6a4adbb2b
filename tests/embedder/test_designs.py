"""Each design against the equations: transformers run text by text under a mask of our own, then pooled by hand."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from mlpool_kernels import reference
from tiny import BIDIRECTIONAL, CAUSAL, DESIGNS, FRAMES, SMALL, TEXTS, L

import mlpool
from mlpool import LastLayerPool, MultiLayerPool
from mlpool.embedder import load


def states_of(family: str, text: str, attention: str, frame: str | None = None) -> list[torch.Tensor]:
    """hidden_states[1:] of one text, unpadded; the attention mask is written out, not asked for by a flag."""
    model = transformers.AutoModel.from_pretrained(tiny.base(family, frame), attn_implementation="sdpa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.base(family, frame))
    before, _ = FRAMES[frame or ("both" if family in tiny.ENCODERS else "bare")]
    ids = torch.tensor([[*before, *tokenizer(text, add_special_tokens=False)["input_ids"], tiny.EOS]])
    call = {}
    if family not in tiny.ENCODERS:
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
        seen = seen if attention == "bidirectional" else seen.tril()
        call["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        call["position_ids"] = torch.arange(ids.shape[1])[None]
        call["use_cache"] = False
    with torch.no_grad():
        return list(model(input_ids=ids, output_hidden_states=True, **call).hidden_states[1:])


def pooled(embedder, states: list[torch.Tensor]) -> torch.Tensor:
    """The embedding [D] of one text by the design's own equation."""
    design, pool = DESIGNS[embedder[0].design], embedder[1].pool
    mask = torch.ones(states[0].shape[:2])
    parameters = dict(pool.named_parameters())
    if pool.__class__ is MultiLayerPool:
        chosen = states if embedder[0].layers is None else [states[i] for i in embedder[0].layers]
        return reference.multi_layer_pool(chosen, mask, parameters, pool.num_heads, design.token_pooling)[0]
    if pool.__class__ is LastLayerPool:
        return reference.last_layer_pool(states[-1], mask, parameters, pool.num_heads, design.token_pooling)[0]
    if design.name == "layer-weights-bidirectional":
        means = torch.stack([state[0].mean(0) for state in states])
        return F.normalize((pool.weights[:, None] * F.normalize(means, dim=-1)).sum(0), dim=-1)
    last = states[-1][0]
    return F.normalize(last[-1] if design.token_pooling == "last" else last.mean(0), dim=-1)


def assert_as_the_equations(embedder, family: str, texts=TEXTS, frame: str | None = None) -> None:
    attention = DESIGNS[embedder[0].design].attention
    with torch.no_grad():
        expected = torch.stack([pooled(embedder, states_of(family, text, attention, frame)) for text in texts])
    got = embedder.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # texts differ, or nothing was tested


CASES = [(design, "qwen2") for design in DESIGNS]
CASES += [
    (f"multi-layer-{attention}", family) for attention in ("causal", "bidirectional") for family in ("gpt2", "opt")
]
CASES += [(design, "bert") for design in BIDIRECTIONAL] + [("multi-layer-bidirectional", "roberta")]
CASES += [("eos-causal", "llama"), ("last-layer-bidirectional", "llama")]


@pytest.mark.parametrize(("design", "family"), CASES)
def test_design_is_its_equation(design, family):
    assert_as_the_equations(tiny.embedder(design, family), family)


@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "last-layer-bidirectional", "eos-causal"])
def test_padded_is_the_same(design):
    embedder = tiny.embedder(design, packing="never")
    assert_as_the_equations(embedder, "qwen2")
    assert not embedder[0].packed


@pytest.mark.parametrize("design", list(DESIGNS))
def test_attention_is_the_designs(design):
    model = tiny.embedder(design)[0].model
    assert mlpool.is_bidirectional(model) == (DESIGNS[design].attention == "bidirectional")


@pytest.mark.parametrize("layers", [[0, 2], [1], [-2, -1]])
def test_a_subset_of_layers(layers):
    embedder = tiny.embedder(layers=layers)
    assert embedder[1].pool.layers == [i % L for i in layers]
    assert embedder[1].pool.layer_weights.shape[0] == len(layers)
    assert_as_the_equations(embedder, "qwen2", TEXTS[:3])


def test_paper_pooler():
    embedder = tiny.embedder(pooler="paper")
    pool = embedder[1].pool
    assert (pool.num_latents, pool.num_heads, pool.head_dim, pool.ff_mult, pool.residual) == (768, 32, 2048, 4, False)
    assert_as_the_equations(embedder, "qwen2", TEXTS[:2])


def test_pooler_of_given_sizes():
    sizes = {"num_latents": 3, "num_heads": 4, "head_dim": 5, "ff_mult": 2, "residual": False}
    embedder = tiny.embedder("last-layer-causal", pooler=sizes)
    assert {name: getattr(embedder[1].pool, name) for name in sizes} == sizes
    assert_as_the_equations(embedder, "qwen2", TEXTS[:2])


@pytest.mark.parametrize(
    ("design", "start"),
    [
        ("last-layer-causal", "eos-causal"),
        ("multi-layer-causal", "eos-causal"),
        ("last-layer-bidirectional", "mean-bidirectional"),
        ("multi-layer-bidirectional", "mean-bidirectional"),
    ],
)
def test_default_pooler_starts_at_plain_pooling(design, start):
    last = {"pooler": {"start": "last"}} if design.startswith("multi-layer") else {}
    one, other = load(tiny.base(), design, **last), load(tiny.base(), start)
    assert abs(one.encode(TEXTS) - other.encode(TEXTS)).max() < 1e-6


def test_where_the_default_starts():
    """At the even mix where all layers of a language model as it was pretrained are pooled, else at the last layer."""
    for base, design, start in (
        (tiny.base(), 5, "all"), (tiny.base(), 3, "all"), (tiny.base("bert"), 5, "last"), (tiny.base(), 4, "last"),
        (tiny.base(), "layer-weights-bidirectional", "all"),
    ):  # fmt: skip
        pool = load(base, design)[1].pool
        assert pool.start == start
        assert pool.uncalibrated == (design in (3, 5) and start == "all")
    one, other = load(tiny.base(), 5), load(tiny.base(), "layer-weights-bidirectional")
    assert abs(one.encode(TEXTS) - other.encode(TEXTS)).max() < 1e-6
    gated = load(tiny.base(), 5, {"residual": True})
    assert abs(gated.encode(TEXTS) - load(tiny.base(), "mean-bidirectional").encode(TEXTS)).max() < 1e-6


@pytest.mark.parametrize("design", [5, "5", "multi-layer-bidirectional"])
def test_design_by_number(design):
    backbone = load(tiny.base(), design)[0]
    assert backbone.design == backbone.get_config_dict()["design"] == "multi-layer-bidirectional"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", CAUSAL)
def test_causal_design_on_an_encoder(design):
    with pytest.raises(
        ValueError, match=f"{design} needs a causal decoder, and bert is an encoder.*one of last-layer-b"
    ):
        load(tiny.base("bert"), design)


@pytest.mark.parametrize("design", ["design-5", 6, 0, "None", ""])
def test_unknown_design(design):
    with pytest.raises(ValueError, match=rf"there is no design {design!r}; choose one of eos-causal \(the paper's 1\)"):
        load(tiny.base(), design)


def test_no_design():
    with pytest.raises(ValueError, match="no design was given; choose one of eos-causal"):
        load(tiny.base())


@pytest.mark.parametrize(
    ("design", "options", "message"),
    [
        (5, {"pooler": "papper"}, 'pooler must be "default", "paper" or a dict of sizes, got .papper'),
        (5, {"pooler": None}, "got None"),
        (5, {"pooler": 3}, "got 3"),
        (5, {"pooler": {"latents": 3}}, "does not fit MultiLayerPool.*latents"),
        (5, {"pooler": {"num_latents": 0}}, "num_latents must be an integer of at least 1"),
        (5, {"pooler": {"hidden_size": 8}}, "does not fit MultiLayerPool"),
        (5, {"pooler": {"token_pooling": "last"}}, "token_pooling is set by the design"),
        (5, {"pooler": {"layers": [1]}}, "layers is an argument of its own"),
        (1, {"pooler": "paper"}, "eos-causal has no latents to size"),
        ("layer-weights-bidirectional", {"pooler": "paper"}, "has no latents to size"),
        ("layer-weights-bidirectional", {"pooler": SMALL}, "does not fit LayerWeightsPool.*num_latents"),
        (4, {"layers": [1]}, r"layers=\[1\] were given, but last-layer-bidirectional reads the last layer only"),
        (5, {"layers": []}, "at least one of 0 … 3"),
        (5, {"layers": [4]}, "at least one of 0 … 3"),
        (5, {"layers": [2, 1]}, "must increase"),
        (5, {"layers": [1, 1]}, "not repeat"),
        (5, {"packing": "sometimes"}, "packing must be one of"),
        (5, {"sliding_window": "half"}, "sliding_window must be one of"),
    ],
)
def test_options_that_do_not_fit(design, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny.base(), design, **options)


def test_first_tokens_are_left_out_of_every_layer(tmp_path):
    """skip_tokens of the pool reaches the taps, which gather for it; saved and loaded, packed and padded."""
    options = {"pooler": {**SMALL, "skip_tokens": 2}}
    whole, short = tiny.embedder("multi-layer-bidirectional"), tiny.embedder("multi-layer-bidirectional", **options)
    text = ["all of them, and the last one twice over if it is asked to"]
    expected = short.encode(text)
    assert abs(whole.encode(text) - expected).max() > 1e-3
    tokens = short[0].preprocess(text)
    with torch.no_grad():
        states = short[0].model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        by_hand = short[1].pool(states, tokens["attention_mask"])
    torch.testing.assert_close(torch.tensor(expected), by_hand, atol=1e-5, rtol=0)
    short.save(str(tmp_path / "out"))
    again = load(tmp_path / "out", packing="never")
    torch.testing.assert_close(torch.tensor(again.encode(text)), torch.tensor(expected), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="leaves the first tokens out of a mean"):
        tiny.embedder("multi-layer-causal", **options)
