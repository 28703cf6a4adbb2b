"""Every layer scored on local tasks, and the depth that follows from it."""

import random
from pathlib import Path

import decoders
import numpy as np
import pytest
from decoders import some_texts, table
from made import TOPICS, sentence, write_jsonl

import mlpool
from mlpool.analysis.inputs import read_pairs
from mlpool.analysis.layers import analyse
from mlpool.cli import main
from mlpool.embedder import DESIGNS

decoder = decoders.decoder


# --- tasks, depth -----------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path) -> Path:
    """Tiny tasks of four kinds, with a dev split each."""
    rng = random.Random(0)
    pairs = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": rng.random()} for _ in range(16)]
    write_jsonl(tmp_path / "sts/made/dev.jsonl", pairs)
    for split, count in (("train", 24), ("dev", 12)):
        rows = [
            {"text": sentence(rng, list(TOPICS.values())[i % 3]), "label": list(TOPICS)[i % 3]} for i in range(count)
        ]
        write_jsonl(tmp_path / f"classification/topics/{split}.jsonl", rows)
    write_jsonl(tmp_path / "retrieval/made/corpus.jsonl", [{"_id": f"d{i}", "text": sentence(rng)} for i in range(9)])
    write_jsonl(tmp_path / "retrieval/made/queries.jsonl", [{"_id": f"q{i}", "text": sentence(rng)} for i in range(6)])
    (tmp_path / "retrieval/made/qrels").mkdir()
    (tmp_path / "retrieval/made/qrels/dev.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(6)))
    return tmp_path


def test_tasks_score_layers_as_eval_scores_models(decoder, local, monkeypatch):
    """Each layer and token pooling, against an embedder that is that layer, by `mlpool eval`'s own way; in one pass."""
    pytest.importorskip("mteb")
    from mlpool.analysis import task_scores as room
    from mlpool.evaluation.evaluate import evaluate_local
    from mlpool.evaluation.local import local_tasks

    asked = []
    real = room.windows
    monkeypatch.setattr(room, "windows", lambda m, texts, *a, **k: asked.extend(texts) or real(m, texts, *a, **k))
    names = ["sts/made", "retrieval/made"]
    model = mlpool.load(decoder, "mean-causal", device="cpu", prompts={"query": "film "})
    found, texts = room.task_scores(model, local_tasks(local, names, "dev"), progress=False, window=8)
    assert found.sets == names
    assert len(asked) <= 32 + 15
    assert set(texts) <= {text for (text,) in asked}
    own = evaluate_local(model, local, names, label="own", split="dev", progress=False)
    assert found.own == pytest.approx([row.score for row in own], abs=1e-6)
    for name, pooling in (("layers-mean", "mean"), ("layers-last", "last"), ("layers-unit", "unit_mean")):
        monkeypatch.setitem(DESIGNS, name, None)  # taken away again behind this test
        del DESIGNS[name]
        mlpool.register_design(name, "causal", mlpool.LayerWeightsPool, pooling)
        one = mlpool.load(decoder, name, layers=[1], device="cpu", prompts={"query": "film "})
        rows = evaluate_local(one, local, names, label=name, split="dev", progress=False)
        assert found.values[pooling][:, 2] == pytest.approx([row.score for row in rows], abs=1e-6)
    (row,) = evaluate_local(one, local, ["classification"], label="one", split="dev", progress=False)
    task = local_tasks(local, ["classification"], "dev")
    found, _ = room.task_scores(model, task, token_pooling="unit_mean", progress=False)
    assert found.metrics == ("accuracy",)
    assert found.values["unit_mean"][0, 2] == pytest.approx(row.score, abs=1e-6)


def test_the_command_scores_tasks_and_names_the_depth(decoder, local, capsys):
    pytest.importorskip("mteb")
    command = ["layers", str(decoder), "--local", str(local), "--device", "cpu"]
    assert main([*command, "--tasks", "sts/made,retrieval/made", "-o", str(local / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["layer", "last", "mean", "unit_mean"]
    assert "Score: Spearman, ndcg_at_10, mean over 2 data sets" in out
    assert "Best depth: " in out
    assert "of the whole model's" in out
    rows = table(local / "out/layers_score.csv")
    assert {r["data_set"] for r in rows} == {"sts/made", "retrieval/made", "mean"}
    assert main([*command, "--tasks", "sts/made", "--pairs", str(local / "sts/made/dev.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "CKA to last" in out
    assert "Score: Spearman, mean over 2 data sets" in out
    for arguments, message in [
        (["--tasks", "sts/none"], "no task 'sts/none'"),
        (["--tasks", "sts/made", "--split", "test"], "no "),
    ]:
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["layers", str(decoder), "--tasks", "sts/made"]) == 2
    assert "--tasks names folders in DIR of --local" in capsys.readouterr().err


def test_the_same_scores_from_a_task_and_from_its_pairs(decoder, local):
    pytest.importorskip("mteb")
    from mlpool.analysis.task_scores import task_scores
    from mlpool.evaluation.local import local_tasks

    model = mlpool.load(decoder, "mean-bidirectional", device="cpu")
    pairs = analyse(model, None, read_pairs(local / "sts/made/dev.jsonl"), progress=False).scores
    tasks, _ = task_scores(model, local_tasks(local, ["sts/made"], "dev"), progress=False)
    for pooling, values in pairs.values.items():
        np.testing.assert_allclose(tasks.values[pooling][0, 1:], values[0, 1:], atol=1e-6)
    both = pairs + tasks
    assert both.sets == ["pairs", "sts/made"]
    pooling, layer = both.best_depth()
    assert layer >= 1
    assert both.mean(pooling)[layer] == max(both.mean(p)[1:].max() for p in both.values)


def test_seconds_by_depth_are_those_of_a_cut_model(decoder):
    """By a clock that a layer's forward puts forward."""
    from mlpool.analysis import speed

    model = mlpool.load(decoder, "mean-causal", packing="never", device="cpu")
    now = [0.0]
    clock = type("Time", (), {"perf_counter": staticmethod(lambda: now[0])})
    for i, layer in enumerate(model[0].model.layers):
        layer.register_forward_hook(lambda *_, i=i: now.__setitem__(0, now[0] + 10.0**i))
    original, speed.time = speed.time, clock
    try:
        seconds = speed.seconds_by_depth(model, some_texts(4))
    finally:
        speed.time = original
    forwards = seconds[-1] / 111
    np.testing.assert_allclose(seconds / forwards, [0, 1, 11, 111])
