"""The end-to-end benchmarks at toy size: what they measure is the same for all, and a red gate shows no speed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from mlpool_kernels import reference

pytest.importorskip("sentence_transformers")
pytest.importorskip("peft")

FOLDER = Path(__file__).parents[1] / "benchmarks"
ONE = ("--size", "tiny", "--pooler", "default", "--design", "multi-layer-bidirectional", "--device", "cpu")
PROVIDERS = ["eager", "sentence-transformers", "mlpool"]
ALWAYS = {
    "case", "mode", "design", "pooler", "provider", "batch", "texts", "tokens", "dtype", "error", "limit", "green",
    "p20_ms", "median_ms", "p80_ms", "texts_per_s", "extra_mib", "ratio_eager", "device", "threads", "torch",
    "transformers", "sentence_transformers", "mlpool", "commit",
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' folder on the path, as when one of them is run; one call of everything is timed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import encode
    import train_step

    for module in (encode, train_step):
        monkeypatch.setattr(module, "BUDGET", ((0.0, 1, 0.0),) * 3)


def rows_of(folder: Path, pattern: str) -> list[dict[str, str]]:
    (path,) = folder.glob(pattern)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_encode_measures_three_equal_providers(benchmarks, tmp_path, capsys):
    import encode
    import summary

    assert encode.main([*ONE, "--lengths", "mixed", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "encode-*.csv")
    assert [row["provider"] for row in rows] == PROVIDERS
    assert ALWAYS | {"ratio_st", "lengths", "tokens_per_s"} <= rows[0].keys()
    assert all(row["green"] == "True" and float(row["median_ms"]) > 0 for row in rows)
    assert 0 < float(rows[2]["error"]) < 1e-5
    assert float(rows[2]["ratio_eager"]) == pytest.approx(
        float(rows[0]["median_ms"]) / float(rows[2]["median_ms"]), rel=1e-4
    )
    capsys.readouterr()
    assert summary.main(sorted(tmp_path.glob("*.csv"))) == 0
    assert "vs ST" in capsys.readouterr().out


def test_a_wrong_embedding_has_no_speed(benchmarks, tmp_path, monkeypatch, capsys):
    import encode

    right = reference.multi_layer_pool
    monkeypatch.setattr(reference, "multi_layer_pool", lambda *args: right(*args) * (1 + 2e-5))
    assert encode.main([*ONE, "--lengths", "24", "--results", str(tmp_path)]) == 1
    row = rows_of(tmp_path, "encode-*.csv")[2]
    assert row["provider"] == "mlpool"
    assert row["green"] == "False"
    assert row["median_ms"] == ""
    assert "IS WRONG" in capsys.readouterr().out


def test_providers_that_see_other_tokens_are_refused(benchmarks):
    from pipelines import EAGER, PEER, build, check_tokens, random_base, texts_of

    base = random_base("tiny", torch.device("cpu"), torch.float32)
    providers = build(base, "multi-layer-causal", "default")
    weights = [{id(p) for p in providers[name][0].parameters()} for name in PROVIDERS]
    assert weights[0] == weights[1] == weights[2]
    texts = texts_of([7, 12])
    assert check_tokens(providers, texts) == [7, 12]
    providers[PEER][0].max_seq_length = 9
    with pytest.raises(RuntimeError, match="same tokens"):
        check_tokens({name: providers[name] for name in (EAGER, PEER)}, texts)


@pytest.mark.parametrize("gradients", ["right", "wrong"])
def test_train_step_compares_losses_and_gradients(benchmarks, tmp_path, monkeypatch, gradients):
    import train_step

    if gradients == "wrong":
        right = reference.multi_layer_pool

        def halved(*args):
            embedding = right(*args)
            return (embedding + embedding.detach()) / 2

        monkeypatch.setattr(reference, "multi_layer_pool", halved)
    wrong = gradients == "wrong"
    assert train_step.main([*ONE, "--tuning", "lora", "--results", str(tmp_path)]) == int(wrong)
    rows = rows_of(tmp_path, "train-step-*.csv")
    assert ALWAYS | {"tuning", "gradient_error", "gradient_limit", "mini_batch_tokens", "loss"} <= rows[0].keys()
    first = {row["provider"]: row for row in rows if row["batch"] == "2"}
    assert list(first) == [*PROVIDERS, "mlpool cached"]
    for name in ("mlpool", "mlpool cached"):
        assert float(first[name]["error"]) < 1e-5
        assert float(first[name]["gradient_error"]) == pytest.approx(1.0 if wrong else 0.0, abs=1e-4)
        assert (first[name]["median_ms"] == "") == wrong
    if not wrong:
        larger = {row["provider"]: row for row in rows if row["batch"] == "8"}
        assert float(larger["mlpool cached"]["error"]) < 1e-5
        assert float(larger["mlpool cached"]["memory_share"]) > 0


def test_the_batch_in_eagers_memory_is_the_largest_that_fits(benchmarks):
    from train_step import compare

    def row(provider: str, batch: int, mib: float) -> dict:
        return {"provider": provider, "batch": batch, "median_ms": 1.0, "texts_per_s": float(batch), "extra_mib": mib}

    fits = [row("eager", 2, 100.0), row("mlpool", 4, 90.0), row("mlpool", 8, 130.0), row("mlpool cached", 8, 99.0)]
    compare(fits, wanted=True)
    assert [r.get("batch_ratio") for r in fits] == [None, 2.0, None, 4.0]
    assert fits[3]["target_met"] is True
    assert fits[3]["ratio_eager"] == 4.0
    misses = [row("eager", 2, 100.0), row("mlpool cached", 6, 99.0), row("mlpool cached", 8, 101.0)]
    compare(misses, wanted=True)
    assert [r["target_met"] for r in misses] == [None, False, None]
    none = [row("eager", 2, 100.0), row("mlpool cached", 2, 101.0)]
    compare(none, wanted=True)
    assert none[1]["target_met"] is False
    assert "does not fit" in none[1]["target"]
