"""Calibrating an embedder by texts alone: what it changes, and who does so by themselves."""

import json

import numpy as np
import pytest
import tiny

from mlpool import load
from mlpool.cli import main
from mlpool.corpus.calibrate_command import sample

TEXTS = [f"{a} and {b}" for a in tiny.TEXTS[0].split() for b in tiny.TEXTS[5].split()]


def alike(embeddings: np.ndarray) -> float:
    """Mean cosine of different texts."""
    cosines = embeddings @ embeddings.T
    return float(cosines[~np.eye(len(cosines), dtype=bool)].mean())


def test_a_language_model_is_whitened_by_texts_alone():
    embedder = load(tiny.base(), "multi-layer-causal-mean")
    assert embedder.pooler.pool.uncalibrated
    before = alike(embedder.encode(TEXTS))
    embedder.calibrate(TEXTS)
    after = embedder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, atol=1e-6)
    assert before > 0.3
    assert abs(alike(after)) < 0.05


def test_prompts_are_read_before_the_texts():
    prompts = {"query": "what is asked: "}
    plain, prompted, by_hand = (load(tiny.base(), "multi-layer-causal-mean", prompts=prompts) for _ in range(3))
    plain.calibrate(TEXTS)
    prompted.calibrate(TEXTS, prompt_name="query")
    by_hand.calibrate([prompts["query"] + text for text in TEXTS])
    np.testing.assert_allclose(prompted.encode(TEXTS), by_hand.encode(TEXTS), atol=1e-4)
    assert np.abs(prompted.encode(TEXTS) - plain.encode(TEXTS)).max() > 0.01


@pytest.mark.parametrize(
    ("base", "design", "pooler"),
    [
        (tiny.base, "mean-causal", "default"),
        (tiny.base, "multi-layer-causal-mean", {"start": "last"}),
        (tiny.base, "multi-layer-causal-mean", "paper"),
        (lambda: tiny.base("bert"), "multi-layer-bidirectional", "default"),
    ],
)
def test_pools_that_do_not_whiten_say_so_before_they_embed(base, design, pooler, monkeypatch):
    if pooler == "paper":
        pooler = {**tiny.SMALL, "residual": False}
    embedder = load(base(), design, pooler)
    monkeypatch.setattr(embedder, "encode", None)
    with pytest.raises(ValueError, match=f"this {design} embedder has no start to calibrate"):
        embedder.calibrate(TEXTS)


def test_texts_and_prompts_that_are_none():
    embedder = load(tiny.base(), "multi-layer-causal-mean", tiny.SMALL)
    for texts in ([], ["one"]):
        with pytest.raises(ValueError, match=f"at least 2 texts.* got {len(texts)}"):
            embedder.calibrate(texts)
    with pytest.raises(ValueError, match="all alike"):
        embedder.calibrate(["the same"] * 3)
    with pytest.raises(ValueError, match="got one string"):
        embedder.calibrate("a text")
    with pytest.raises(ValueError, match="there is no prompt 'other'"):
        embedder.calibrate(TEXTS, prompt_name="other")
    assert embedder.pooler.pool.uncalibrated


def test_what_was_calibrated_is_not_calibrated_again():
    embedder = load(tiny.base(), "multi-layer-causal-mean", tiny.SMALL)
    embedder.calibrate(TEXTS)
    with pytest.raises(ValueError, match="until it is calibrated or trained"):
        embedder.calibrate(TEXTS)


def test_the_command(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "", " "]))
    words = ["calibrate", str(tmp_path / "texts.txt"), "--device", "cpu", "-o", str(tmp_path / "out"), "-m"]
    assert main([*words, str(tiny.base()), "--texts", "40"]) == 0
    assert "whitened by 40 texts" in capsys.readouterr().out
    assert abs(alike(load(tmp_path / "out").encode(TEXTS))) < 0.1
    assert main([*words, str(tiny.base()), "--texts", "1"]) == 2
    assert "--texts must be at least 2, got 1" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out")]) == 2  # a saved embedder
    assert main([*words, str(tiny.base()), "--design", "eos-causal"]) == 2
    assert "no start to calibrate" in capsys.readouterr().err


def test_several_columns(tmp_path, capsys):
    rows = [{"query": f"{text}?", "positive": text} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["calibrate", str(tmp_path / "pairs.jsonl"), "--device", "cpu", "-o", str(tmp_path / "out"), "-m"]
    words.append(str(tiny.base()))
    assert main([*words, "--text-column", "query", "positive"]) == 0
    assert f"whitened by {min(128, 2 * len(TEXTS))} texts" in capsys.readouterr().out
    assert main(words) == 2
    assert "2 other string columns" in capsys.readouterr().err


def test_a_sample_is_even_and_the_same_each_time():
    texts = [str(i) for i in range(1000)]
    drawn = sample(["", *texts, " "], 100)
    assert drawn == sample(texts, 100)
    assert len({*drawn}) == 100
    assert 400 < np.mean([int(text) for text in drawn]) < 600
    assert sample(texts[:5], 100) == texts[:5]
