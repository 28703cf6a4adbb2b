"""A model cut behind the highest layer that is read gives the numbers it gave, and nothing above is kept."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import SMALL, TEXTS, L, base, embedder

import mlpool
from mlpool.embedder.depth import cut
from mlpool.taps import Taps, find_layers

DESIGN = "multi-layer-bidirectional"


def reads(model: mlpool.Embedder) -> torch.Tensor:
    """layer_states of some texts, as the pool gets them."""
    features = model[0].preprocess([text for text in TEXTS if text.strip()])
    with torch.no_grad():
        return model[0](features)["layer_states"]


def weight_names(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "bert"])
def test_layers_imply_the_depth_and_read_the_same_numbers(family, packing):
    whole = embedder(DESIGN, family, packing=packing, layers=[0, 2], depth=L)
    short = embedder(DESIGN, family, packing=packing, layers=[0, 2])
    assert [whole[0].num_layers, short[0].num_layers] == [L, 3]
    assert (whole[0].depth, short[0].depth) == (None, 3)
    assert torch.equal(reads(whole), reads(short))
    np.testing.assert_array_equal(whole.encode(TEXTS[:2]), short.encode(TEXTS[:2]))


def test_a_pool_of_all_kept_layers_reads_the_top_one_raw():
    whole, short = embedder(DESIGN, layers=[0, 1, 2], depth=L), embedder(DESIGN, depth=3)
    assert short[1].pool.num_layers == 3
    assert torch.equal(reads(whole), reads(short))


def test_the_last_state_of_a_cut_model_is_final_normed():
    short = embedder("mean-bidirectional", depth=2, packing="never")
    features = short[0].preprocess(["how many layers"])
    whole = tiny.transformer()
    mlpool.bidirectional(whole)
    with torch.no_grad():
        states = whole(**features, output_hidden_states=True).hidden_states[2]
        expected = whole.norm(states).mean(1)
    torch.testing.assert_close(short[0](features)["token_embeddings"].mean(1), expected)


def test_taps_of_the_raw_last_layer():
    model = tiny.transformer()
    raw = []
    find_layers(model)[1][-1].register_forward_hook(lambda module, args, output: raw.append(output))
    ids = torch.arange(6)[None]
    with Taps(model, layers=[1, L - 1], final_norm=False) as taps:
        state = model(ids).last_hidden_state[:, -1]
        rows = taps.take()
    assert torch.equal(rows[:, 1], raw[0][:, -1])
    assert not torch.allclose(rows[:, 1], state)


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_as_deep_and_embeds_alike(tmp_path, lora):
    model = embedder(DESIGN, layers=[0, 1])
    if lora:
        tiny.shake(mlpool.add_lora(model, rank=2)[0], only="lora_")
    model.save(tmp_path / "saved")
    names = weight_names(tmp_path / "saved")
    assert any("layers.1." in name for name in names)
    assert not any(f"layers.{i}." in name for name in names for i in range(2, L))
    again = mlpool.load(tmp_path / "saved", device="cpu")
    assert (again[0].num_layers, again[0].depth) == (2, 2)
    np.testing.assert_allclose(again.encode(TEXTS[:2]), model.encode(TEXTS[:2]), atol=1e-6)
    if lora:
        mlpool.merge(again).save(tmp_path / "merged")
        merged = mlpool.load(tmp_path / "merged", device="cpu")
        np.testing.assert_allclose(merged.encode(TEXTS[:2]), model.encode(TEXTS[:2]), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "bert"])
def test_a_training_has_no_weight_that_gets_no_gradient(family):
    from mlpool.training.trainer import prepare

    model = embedder(DESIGN, family, layers=[0, 1])
    prepare(model)
    model(model[0].preprocess(["a text", "another"]))["sentence_embedding"].sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".1." in name for name in trained)
    assert [name for name in trained if model.get_parameter(name).grad is None] == []


def test_an_exported_folder_is_as_deep(tmp_path):
    """The one file of a cut base is tried with those of the others (tests/exchange)."""
    from mlpool.exchange.export import export

    plain = mlpool.load(base(), "mean-causal", depth=2, device="cpu")
    assert export(plain, tmp_path / "plain") < 1e-5
    assert not any("layers.2." in name for name in weight_names(tmp_path / "plain"))


def test_a_model_is_cut_once_and_by_what_its_config_lists():
    model = tiny.transformer(layer_types=["full_attention"] * L)
    assert len(find_layers(cut(cut(model, 3), 3))[1]) == 3
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "from 1 to the 4"),
        ({"depth": L + 1}, "from 1 to the 4"),
        ({"depth": "most"}, "'most'"),
        ({"depth": True}, "True"),
        ({"depth": 2, "layers": [0, 2]}, "reads layer 2 .* take depth=3"),
        ({"depth": 2, "layers": [-1]}, "reads layer 3"),
    ],
)
def test_bad_depths(options, message):
    with pytest.raises(ValueError, match=message):
        mlpool.load(base(), DESIGN, SMALL, **options)


def test_a_saved_embedder_has_decided_its_depth(tmp_path):
    embedder(DESIGN, layers=[0, 1]).save(tmp_path)
    with pytest.raises(ValueError, match="has decided depth"):
        mlpool.load(tmp_path, depth=1)


def test_a_model_whose_layers_need_those_above_stays_whole():
    model = tiny.transformer()
    first, last = model.layers[0], model.layers[-1]

    def both(module, args, output):
        return output + len(model.layers)

    first.register_forward_hook(both)
    with pytest.raises(ValueError, match="cannot be cut to 2 of 4 layers"):
        cut(model, 2)
    assert len(model.layers) == model.config.num_hidden_layers == L
    assert model.layers[-1] is last
