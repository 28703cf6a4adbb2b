"""`mlpool merge`, `mlpool export` and `mlpool import-released`, as they are typed."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import SMALL, TEXTS, base, embedder, shake

from mlpool import cli
from mlpool.embedder import add_lora, load, merge
from mlpool.exchange import commands
from mlpool.exchange.checked import agreement
from mlpool.exchange.export import load_exported

COARSE = 1e4  # added to every token embedding


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter for each of two designs, and what they give."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for design in ("multi-layer-bidirectional", "mean-bidirectional"):
        made = add_lora(embedder(design, prompts={"query": "read: "}, num_hidden_layers=1))
        shake(made[0].model, only="lora_B")
        expected[design] = made.encode(TEXTS)
        made.save(root / design, verify=False)
    return root, expected


def run(*arguments) -> int:
    return cli.main([*map(str, arguments), "--device", "cpu"])


def test_merge(saved, tmp_path, capsys):
    root, expected = saved
    assert run("merge", root / "multi-layer-bidirectional", "-o", tmp_path / "out") == 0
    assert "multi-layer-bidirectional, merged; embeddings agree to" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/adapter*"))
    merged = load(tmp_path / "out", device="cpu")
    assert np.abs(merged.encode(TEXTS) - expected["multi-layer-bidirectional"]).max() < 1e-5
    assert merged.prompts["query"] == "read: "


def test_merge_in_another_dtype(saved, tmp_path):
    root, expected = saved
    assert run("merge", root / "mean-bidirectional", "-o", tmp_path / "out", "--dtype", "bfloat16") == 0
    merged = load(tmp_path / "out", device="cpu")
    assert merged.dtype == torch.bfloat16
    assert np.abs(merged.encode(TEXTS) - expected["mean-bidirectional"]).max() < 5e-2


def test_merge_where_the_base_model_moved(saved, tmp_path, capsys):
    root, _ = saved
    shutil.copytree(root / "mean-bidirectional", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    arguments = ("merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert run(*arguments) == 2
    assert "which is not there; pass base=" in capsys.readouterr().err
    assert run(*arguments, "--base", base(num_hidden_layers=1)) == 0


def test_merge_refuses(saved, tmp_path, capsys, monkeypatch):
    root, _ = saved

    def refused(match, *arguments):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert match in error, error
        assert error.startswith("mlpool: error: ")

    embedder("eos-causal").save(tmp_path / "full", verify=False)
    refused("there is no adapter to merge", "merge", tmp_path / "full", "-o", tmp_path / "out")
    refused("already and not empty", "merge", root / "mean-bidirectional", "-o", tmp_path / "full")
    refused("no folder", "merge", tmp_path / "none", "-o", tmp_path / "out")

    def careless(made, *_):
        return shake(merge(made), 0.05)

    monkeypatch.setattr("mlpool.embedder.adapters.merge", careless)
    refused(
        "merging in torch.float32 changes embeddings by", "merge", root / "mean-bidirectional", "-o", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def coarse():
    """An embedder with an adapter and large states that nearly cancel in the first norm: float32 is 1e-4 off
    float64, as in a deep decoder with massive activations."""
    # Of raw rows: brought to one length, rows that are all alike hide it.
    made = add_lora(embedder("multi-layer-bidirectional", pooler={**SMALL, "residual": True}))
    shake(made[0].model, only="lora_B")
    with torch.no_grad():
        made[0].model.embed_tokens.weight.add_(COARSE)
    return made.eval()


def test_merge_allows_what_the_precision_itself_does(coarse, tmp_path):
    """More than unit vectors round, and no more than twice what the model does to itself: merged, saved, exported."""
    from mlpool.embedder.embedder import _LIMITS

    with torch.no_grad():
        before = coarse._probe()
        with coarse.in_float64():
            exact = coarse._probe()
        own = (before.double() - exact).abs().max().item()
        assert own > 3 * _LIMITS[torch.float32], "the fixture is not coarse enough to test anything"
        error = commands._merge(coarse)
        with coarse.in_float64():
            assert (coarse._probe() - exact).abs().max() < own  # each weight is rounded once, from float64
    assert error <= 2 * own + _LIMITS[torch.float32]


def test_merge_names_the_weight_that_is_wrong(monkeypatch):
    from peft.tuners.lora.layer import Linear

    def broken(value):
        made = add_lora(embedder("mean-bidirectional"))
        shake(made[0].model, only="lora_B")
        made[0].model.layers[2].mlp.up_proj.lora_B.default.weight.data[0] = value
        return made

    with pytest.raises(ValueError, match=r"merging makes layers\.2\.mlp\.up_proj\.weight infinite or NaN"):
        merge(broken(float("nan")))
    half = broken(6e4)
    half.half()
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight infinite or NaN in torch.float16; merge in"):
        merge(half)
    whole = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *arguments: 0.9 * whole(*arguments))
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight does not compute what it and its adapter"
    ):
        merge(broken(1.0))


def test_careless_files_are_still_refused(coarse, tmp_path):
    """What the precision does is no excuse for what it does not do."""
    exact = coarse._probe()
    with pytest.raises(RuntimeError, match="differs by"):
        agreement(coarse, exact + 0.01, coarse._probe, "it differs")
    with pytest.raises(RuntimeError, match="differs by nan"):
        agreement(coarse, exact * float("nan"), coarse._probe, "it differs")


def test_export_merges_and_chooses_by_design(saved, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    root, expected = saved
    assert run("export", root / "mean-bidirectional", "-o", tmp_path / "plain") == 0
    assert "SentenceTransformer(path)" in capsys.readouterr().out
    plain = SentenceTransformer(str(tmp_path / "plain"), device="cpu", local_files_only=True)
    assert np.abs(plain.encode(TEXTS) - expected["mean-bidirectional"]).max() < 1e-5
    assert run("export", root / "multi-layer-bidirectional", "-o", tmp_path / "out.pt2") == 0
    assert "load_exported" in capsys.readouterr().out
    exported = load_exported(tmp_path / "out.pt2")
    got = exported(*exported.tokenize(TEXTS)).numpy()
    assert np.abs(got - expected["multi-layer-bidirectional"]).max() < 1e-5


def test_export_refuses(saved, tmp_path, capsys):
    root, _ = saved
    for match, *options in (
        ("has a trained pooler", root / "multi-layer-bidirectional", "--format", "st", "-o", tmp_path / "out"),
        ("ends in .pt2", root / "multi-layer-bidirectional", "-o", tmp_path / "out"),
        ("is named like a file", root / "mean-bidirectional", "-o", tmp_path / "out.pt2"),
        ("already and not empty", root / "mean-bidirectional", "-o", root),
    ):
        assert run("export", *options) == 2
        assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_import_released(tmp_path, capsys):
    from test_released import HEADS, by_hand, write

    model = write(tmp_path, "Llama", None)
    arguments = ("import-released", tmp_path / "released", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert run(*arguments) == 2
    assert "which no file says: pass design= (--design)" in capsys.readouterr().err
    assert run(*arguments, "--design", 4, "--num-heads", HEADS) == 0
    assert "last-layer-bidirectional; loads with mlpool.load(" in capsys.readouterr().out
    expected = by_hand(model, 4, torch.load(tmp_path / "released/attn_pool.pt")).numpy()
    assert np.abs(load(tmp_path / "out", device="cpu").encode(TEXTS) - expected).max() < 2e-5
