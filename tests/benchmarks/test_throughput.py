"""The pools' benchmark at toy size: every exact choice is timed against the pick, and a wrong row has no speed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from mlpool_kernels import Plan, Sizes
from mlpool_kernels import plan as cost_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch):
    """The module, as when it is run, with one tiny preset; nothing but its cases is measured."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases
    import throughput

    preset = cases.Preset("multi", 32, 3, paper=False)
    monkeypatch.setitem(cases.PRESETS, "toy", preset)
    both = [cases.Case("toy", 2, mode, tokens=4) for mode in (cases.EVAL, cases.TRAIN)]
    monkeypatch.setattr(
        throughput, "CASES", {("cpu", name): both for name in ("quick", "full", "choices", "choices-quick")}
    )
    rounds = throughput.rounds
    monkeypatch.setattr(throughput, "rounds", lambda runs, clock, *_: rounds(runs, clock, 0.0, 2, False))
    for rate in ("product_rate", "copy_rate"):
        monkeypatch.setattr(throughput, rate, lambda *_: 1e11)
    return throughput


def rows_of(folder: Path, pattern: str) -> list[dict[str, str]]:
    (path,) = folder.glob(pattern)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_choice_is_timed_against_the_pick(throughput, tmp_path, capsys):
    assert throughput.main(["--choices", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "choices-cpu-*-full.csv")
    for mode, memory in (("eval", 0), ("forward+backward", 2)):
        group = [row for row in rows if row["mode"] == mode]
        # The pick, and one row for every entry that can differ on a CPU: keys, values twice, memory twice.
        assert len(group) == 4 + memory
        plans = [Plan.parse(row["plan"]) for row in group]
        assert len(set(plans)) == len(plans)
        assert {p.keys for p in plans} == set(cost_model.KEYS)
        assert {p.values for p in plans} == set(cost_model.VALUES)
        assert [row["picked"] for row in group] == ["True", *["False"] * (len(group) - 1)]
        times = {
            row["plan"]: float(row["median_ms"]) for row in group if Plan.parse(row["plan"]).memory == plans[0].memory
        }
        assert [row["plan"] for row in group if row["best"] == "True"] == [min(times, key=times.__getitem__)]
        assert float(group[0]["regret"]) == pytest.approx(times[str(plans[0])] / min(times.values()), rel=1e-3)
        assert all(float(row["predicted_ms"]) > 0 and 0 <= float(row["error"]) < 1e-5 for row in group)
    assert "picked / best" in capsys.readouterr().out


def test_a_wrong_row_has_no_speed_and_the_rest_is_measured(throughput, tmp_path, monkeypatch, capsys):
    """One choice is off, one raises: both are said, and the exit status tells."""
    import work

    right = work.Work.fast

    def fast(self):
        if self.pool.choices == {"values": "late"}:
            return right(self) * 1.01
        if self.pool.choices == {"keys": "plain"} and not self.training:
            raise RuntimeError("no such kernel")
        return right(self)

    monkeypatch.setattr(work.Work, "fast", fast)
    assert throughput.main(["--choices", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]) == 1
    rows = rows_of(tmp_path, "choices-*.csv")
    wrong = {(row["mode"], row["provider"]) for row in rows if row["green"] == "False"}
    assert wrong == {("eval", "mlpool values=late"), ("eval", "mlpool keys=plain"),
                     ("forward+backward", "mlpool values=late")}  # fmt: skip
    assert all((row["median_ms"] == "") == (row["green"] == "False") for row in rows)
    out = capsys.readouterr()
    assert "WRONG: toy B=2 eval mlpool values=late: out of bounds" in out.out
    assert "no such kernel" in out.err


def test_a_case_that_raises_leaves_the_others(throughput, tmp_path, monkeypatch):
    import work

    settle = work.Work.settle

    def only_training(self):
        if not self.training:
            raise RuntimeError("no reference")
        settle(self)

    monkeypatch.setattr(work.Work, "settle", only_training)
    assert throughput.main(["--device", "cpu", "--threads", "1", "--no-compile", "--results", str(tmp_path)]) == 1
    rows = rows_of(tmp_path, "throughput-*.csv")
    assert [(row["mode"], row["provider"]) for row in rows if row["median_ms"]] == [
        ("forward+backward", "eager"), ("forward+backward", "mlpool")
    ]  # fmt: skip
    assert "no reference" in rows[0]["failed"]


GPU = {"training": False, "triton": True, "masked": False}


def test_alternatives_differ_in_what_runs(throughput):
    """A GPU's choices, of a pick that has its kernels: each once, and none that changes nothing."""
    from cases import alternatives

    small, large = Sizes(64, 24, 896, 64, 8, 64, 896), Sizes(64, 24, 896, 768, 32, 2048, 3584)
    kernels = Plan("absorbed", "early", "one", "fused", "recompute", "kernel")
    assert alternatives(small, kernels, **GPU) == [
        {"keys": "plain"}, {"values": "absorbed"}, {"values": "late"}, {"launches": "two"}, {"mix": "product"},
        {"feed_forward": "chunked"},
    ]  # fmt: skip
    # Too many latents for one tile; saved [a|g] is a product's; late values and plain keys have no kernel alone.
    plain = Plan("plain", "late", "two", "chunked", "save")
    assert alternatives(large, plain, **{**GPU, "training": True}) == [
        {"keys": "absorbed"}, {"values": "early"}, {"values": "absorbed"}, {"keys": "absorbed", "launches": "one"},
        {"memory": "recompute_ff"}, {"memory": "recompute"},
    ]  # fmt: skip
    assert {"values": "early", "mix": "kernel"} in alternatives(small, plain, **GPU)
    assert not any("launches" in other for other in alternatives(small, kernels, **{**GPU, "masked": True}))
    assert not any("keys" in other for other in alternatives(small._replace(keys=1), kernels, **GPU))
