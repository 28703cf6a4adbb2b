"""Tuning: what fails is said and the rest goes on; what is written is what the cost model reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from mlpool_kernels import tiles
from mlpool_kernels.plan import Operation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tune(monkeypatch):
    """The module, as when it is run: its folder is on the path; after a trial no tile stays chosen."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune

    monkeypatch.setattr(tune, "REPEATS", 2)
    before = tiles._overrides
    yield tune
    assert tiles._overrides is before


class OutOfResources(Exception):
    """As Triton calls a tile that does not fit the device."""


def job(tune, kernel, found, cost=None):
    """A job that gives `found` of each candidate's first number, or raises it; 1 is right."""

    def run():
        result = found(next(iter(tiles._overrides()[kernel].values()), 0))
        if isinstance(result, Exception):
            raise result
        return [torch.full((4,), float(result))]

    return tune.Job(kernel, "small", run, lambda: [torch.ones(4)], cost)


def fits(_):
    return 1


def main(tune, monkeypatch, tmp_path, *jobs) -> tuple[int, list[dict[str, str]]]:
    monkeypatch.setattr(tune, "jobs", lambda new, small: iter(jobs))
    status = tune.main(["--results", str(tmp_path)])
    (path,) = tmp_path.glob("tune-*.csv")
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def plain(tune):
    return [
        job(tune, name, fits, Operation(unit, flops, moved))
        for name, unit, flops, moved in (
            ("launch", "launch", 0, 0), ("copy", "memory", 0, 1 << 20), ("product", "product", 1 << 20, 1 << 10)
        )
    ]  # fmt: skip


def test_rates_and_tiles_are_written_and_read_again(tune, monkeypatch, tmp_path):
    status, rows = main(tune, monkeypatch, tmp_path, *plain(tune), job(tune, "gate", fits))
    assert status == 0
    assert len(rows) == 3 + len(tiles.TILES["gate"])
    (path,) = tmp_path.glob("tiles-*.json")
    monkeypatch.undo()
    monkeypatch.setenv("MLPOOL_TILES", str(path))
    tiles.tuned.cache_clear()
    try:
        assert tiles.tile("gate") in tiles.TILES["gate"]
        rates = tiles.tuned().rates["float32"]
        assert rates.source == f"fitted for {tiles.device_here()}"
        timed = {row["kernel"]: float(row["median_us"]) / 1e6 for row in rows if row["kernel"] != "gate"}
        assert rates.launch == pytest.approx(timed["launch"] / tune.LAUNCHES, rel=1e-3)
        for unit, kernel in (("memory", "copy"), ("product", "product")):
            left = max(timed[kernel] - rates.launch, timed[kernel] / 2)
            assert getattr(rates, unit) == pytest.approx((1 << 20) / left, rel=1e-2)
    finally:
        tiles.tuned.cache_clear()


def test_rates_are_those_that_made_the_times(tune):
    """Rows whose times follow from known rates give these back, by geometric mean where they differ."""
    rates = {"product": 2e12, "attend": 1e12, "mix": 5e11, "feed_forward": 3e12, "gate": 4e11, "memory": 1e11}
    rates["launch"] = 1e-6

    def row(unit, flops, moved, factor=1.0):
        seconds = rates["launch"] + max(moved / rates["memory"], factor * flops / rates[unit])
        return {"unit": unit, "flops": flops, "bytes": moved, "median_us": seconds * 1e6}

    rows = [row("memory", 0, 1e9), {"unit": "launch", "flops": 0, "bytes": 0, "median_us": 1e6 * 1e-6 * tune.LAUNCHES}]
    for unit in ("product", "attend", "mix", "feed_forward", "gate"):
        rows += [row(unit, 1e10, 1e6, factor=2.0), row(unit, 3e11, 1e8, factor=0.5)]
        rows.append(row(unit, 1e9, 1e6, factor=100) | {"chosen": False})
    assert tune.fit(rows, kernels=True) == pytest.approx(rates, rel=1e-3)
    assert tune.fit([r for r in rows if r["unit"] != "mix"], kernels=True) is None
    assert tune.fit([r for r in rows if r["unit"] != "mix"], kernels=False)["mix"] == pytest.approx(2e12, rel=1e-3)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (lambda first: 1.5 if first == 32 else 1, "WRONG"),
        (lambda first: RuntimeError("a fault") if first == 32 else 1, "RuntimeError: a fault"),
        (lambda first: OutOfResources("shared memory"), "NO CANDIDATE LEFT: softmax small"),
    ],
)
def test_a_failure_is_said_and_the_rest_goes_on(tune, monkeypatch, tmp_path, capsys, found, said):
    status, rows = main(tune, monkeypatch, tmp_path, *plain(tune), job(tune, "softmax", found), job(tune, "gate", fits))
    assert status == 1
    assert said in capsys.readouterr().out
    (path,) = tmp_path.glob("tiles-*.json")
    chosen = json.loads(path.read_text())["tiles"]
    assert "gate" in chosen
    assert chosen.get("softmax", tiles.TILES["softmax"][1]) == tiles.TILES["softmax"][1]
    assert len(rows) == 3 + len(tiles.TILES["softmax"]) + len(tiles.TILES["gate"])
    assert next(row["median_us"] for row in rows if row["kernel"] == "softmax") == ""


def test_a_tile_that_does_not_fit_is_no_fault(tune, monkeypatch, tmp_path):
    found = lambda first: OutOfResources("registers") if first == 32 else 1  # noqa: E731
    assert main(tune, monkeypatch, tmp_path, *plain(tune), job(tune, "softmax", found))[0] == 0


def test_a_lost_gpu_ends_the_run(tune, monkeypatch, tmp_path, capsys):
    import rows as loop

    for module in (tune, loop):
        monkeypatch.setattr(module, "is_lost", lambda device: True)
    found = lambda first: RuntimeError("CUDA error: an illegal memory access was encountered")  # noqa: E731
    status, rows = main(tune, monkeypatch, tmp_path, *plain(tune), job(tune, "softmax", found), job(tune, "gate", fits))
    assert status == 1
    assert [row["kernel"] for row in rows] == ["launch", "copy", "product", "softmax"]
    assert "an illegal memory access" in rows[-1]["failed"]
    assert "the GPU answers this process no more" in capsys.readouterr().err
