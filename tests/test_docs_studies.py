"""Scores of studies: what a study's folder is brought in as, and the table that it makes."""

from __future__ import annotations

import csv
import inspect
import json
from pathlib import Path

import pytest
import studies

from mlpool import MultiLayerPool


def run(study: Path, label: str, seed: int, scores: dict[str, float], pool: dict | None = None, **train) -> None:
    folder = study / "runs" / label / f"seed-{seed}"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"learning_rate": 1e-3, "lora": True, **train}}))
    (folder / "run.json").write_text("{}")
    if pool:
        (folder / "model/1_Pooler").mkdir(parents=True)
        (folder / "model/1_Pooler/config.json").write_text(json.dumps(pool))
    with (folder / "evaluation/results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seed", "split", "task", "metric", "n_items", "score", "date"])
        writer.writeheader()
        for task, score in scores.items():
            same = {"metric": "spearman", "n_items": 9, "date": "2026-01-02T03:04:05"}
            writer.writerow({**same, "seed": seed, "split": "test", "task": task, "score": score})
            writer.writerow({**same, "seed": seed, "split": "dev", "task": task, "score": 0})


POOL = {"num_latents": 64, "residual": "mix", "start": "all", "whiten": True}


def test_a_study_becomes_a_table(tmp_path):
    for seed, (a, b) in enumerate([(0.5, 0.7), (0.6, 0.8)]):
        run(tmp_path / "s", "m", seed, {"t/a": a, "t/b": b}, design="mean-causal")
    run(tmp_path / "s", "p", 0, {"t/a": 0.7, "t/b": 0.7}, POOL, design="multi-layer-causal-mean", depth=9)
    (tmp_path / "s/runs/p/seed-1").mkdir()
    (tmp_path / "s/runs/p/seed-1/config.json").write_text("{}")  # not finished
    path = tmp_path / "scores.csv"
    assert studies.add(tmp_path / "s", "base", path=path) == 6
    assert studies.add(tmp_path / "s", "base", path=path) == 6  # brought in once
    lines = studies.read(path)
    assert len(lines) == 6
    deep = "multi-layer-causal-mean, 64 latents, 9 layers kept at 0.001"
    shown = studies.Table("base", {"A": ("t/a",), "B": ("t/b",)}, {"mean-causal at 0.001": "mean", deep: "deep"})
    assert studies.table(shown, lines).splitlines()[2:] == [
        "| mean | 1e-3 | 0.550 | **0.750** | 0.650 | 0.600, 0.700 |",
        "| deep | 1e-3 | **0.700** | 0.700 | **0.700** | 0.700 |",
    ]
    with pytest.raises(LookupError, match="has no 'deeper' of base with all of A, B"):
        studies.means(shown, "deeper", lines)
    with pytest.raises(SystemExit, match="holds no finished run"):
        studies.add(tmp_path / "none", "base", path=path)


def test_a_cost_is_that_of_the_same_base_and_design(tmp_path):
    lines = ["base,design,encode_texts_per_s,train_texts_per_s"]
    lines += ["base,mean-causal,10,4", "base,multi,9,3", "other,multi,1,1"]
    (tmp_path / "costs.csv").write_text("\n".join(lines) + "\n")
    shown = studies.Table("base", {}, {}, costs="mean-causal")
    assert studies.costs(shown, "multi at 0.001", tmp_path / "costs.csv") == ["0.90", "0.75"]
    with pytest.raises(LookupError, match="deep"):
        studies.costs(shown, "deep at 0.001", tmp_path / "costs.csv")


def test_a_default_pool_is_one_without_a_number():
    assert inspect.signature(MultiLayerPool).parameters["num_latents"].default == studies.LATENTS


@pytest.mark.parametrize(
    ("pool", "raw", "row"),
    [
        ({"num_latents": 16}, True, "d at 0.001"),
        ({"residual": False, "whiten": False}, True, "d, 64 latents, released at 0.001"),
        ({"whiten": False}, True, "d, 64 latents, not whitened, from all layers at 0.001"),
        ({"whiten": False}, False, "d, 64 latents at 0.001"),
    ],
)
def test_a_row_says_what_is_special(pool, raw, row):
    assert studies.named({"design": "d", "learning_rate": 1e-3, "lora": True}, {**POOL, **pool}, raw) == row
