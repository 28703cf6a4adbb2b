"""`mlpool merge`, `mlpool export` and `mlpool import-released`, as they are typed."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import TEXTS, base, embedder, shake

from mlpool import cli
from mlpool.embedder import add_lora, load
from mlpool.exchange.export import load_exported

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter for each of two designs, and what they give."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    for design in ("multi-layer-bidirectional", "mean-bidirectional"):
        made = add_lora(embedder(design, prompts={"query": "read: "}))
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
    assert run(*arguments, "--base", base()) == 0


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
    from mlpool.exchange import commands

    def careless(made):
        return shake(commands_merge(made), 0.05)

    commands_merge = commands.merge_adapter
    monkeypatch.setattr(commands, "merge_adapter", careless)
    refused(
        "merging in torch.float32 changes embeddings by", "merge", root / "mean-bidirectional", "-o", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


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
