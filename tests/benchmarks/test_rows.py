"""Rows that are on disk as soon as they are measured, the loop over cases, and what a run says before it starts."""

from __future__ import annotations

import argparse
import csv
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
FACTS = {
    "device": "CPU 2 cores",
    "threads": 2,
    "code": "abc",
    "tiles": "default",
    "torch": "2.11.0",
    "commit": "1e2345678",
    "load": 0.5,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "rows.csv"


def rows_at(path: Path, again: bool = False, **facts):
    from rows import Rows

    return Rows(path, FACTS | facts, again)


def pair(case: str, **more) -> list[dict]:
    return [{"case": case, "provider": name, "green": True, **more} for name in ("a", "b")]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_in_the_file_when_add_returns_and_comes_back_as_it_was(path):
    row = {
        "case": "x",
        "n": 3,
        "share": 1.5e-9,
        "green": True,
        "none": None,
        "said": 'two\nlines, "quoted"',
        "id": "007",
    }
    rows_at(path).add(row)
    (read,) = rows_at(path).all
    expected = row | FACTS | {"said": 'two lines, "quoted"', "part": "1/1"}
    del expected["none"]
    assert read == expected


def test_columns_may_grow(path):
    rows = rows_at(path)
    rows.add({"case": "x", "green": True})
    rows.add({"case": "y", "green": True, "new": 1})
    rows.add({"case": "z", "green": True})
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["case"], row["new"]) for row in read] == [("x", ""), ("y", "1"), ("z", "")]
    assert [row["code"] for row in read] == ["abc"] * 3
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("lost", range(1, 100, 6))
def test_a_group_that_a_kill_cut_short_does_not_count(path, lost):
    """Wherever within the last group's two lines the file ends: neither row counts, and both can be added again."""
    rows = rows_at(path)
    rows.add(*pair("x"))
    first = path.read_text()
    rows.add(*pair("y"))
    whole = path.read_text()
    assert lost < len(whole) - len(first)
    path.write_text(whole[:-lost])
    again = rows_at(path)
    assert [row["case"] for row in again.all] == ["x", "x"]
    assert not again.has(case="y")
    again.add(*pair("y"))
    assert path.read_text() == whole


@pytest.mark.parametrize("name", ["device", "threads", "code", "tiles", "torch"])
def test_rows_of_another_run_stay_and_do_not_count(path, name, capsys):
    rows_at(path).add(*pair("x"))
    other = rows_at(path, **{name: "other"})
    assert other.all == []
    assert "2 rows of other code, versions, tiles or devices stay, uncounted" in capsys.readouterr().err
    other.add(*pair("x"))
    assert len(path.read_text().splitlines()) == 5
    assert len(rows_at(path).all) == len(other.all) == 2


@pytest.mark.parametrize("name", ["commit", "load", "date"])
def test_a_commit_that_changes_no_code_keeps_the_rows(path, name):
    rows_at(path).add(*pair("x"))
    assert len(rows_at(path, **{name: "other"}).all) == 2


def test_again_drops_the_whole_group_of_a_wrong_row(path):
    rows = rows_at(path)
    rows.add({"case": "x", "green": True}, {"case": "x", "green": False})
    rows.add(*pair("y"))
    assert [row["case"] for row in rows_at(path, again=True, code="other").of()] == []
    assert [row["case"] for row in rows_at(path, again=True).all] == ["y", "y"]
    assert [row["case"] for row in rows_at(path).all] == ["y", "y"]


# --- the loop ---------------------------------------------------------------------------------------------------------


def run(path: Path, minutes: float | None = None, again: bool = False, **cases) -> int:
    from rows import run_cases

    todo = [({"case": name}, measure) for name, measure in cases.items()]
    return run_cases(todo, rows_at(path, again), CPU, minutes)


def broken():
    raise RuntimeError("no such kernel")


def test_a_case_that_raises_is_a_row_and_stops_no_other(path, capsys):
    calls = []
    fine = lambda: calls.append("y") or pair("y")  # noqa: E731
    assert run(path, x=broken, y=fine) == 1
    assert [(row["case"], row["green"]) for row in rows_at(path).all] == [("x", False), ("y", True), ("y", True)]
    assert rows_at(path).all[0]["failed"] == "RuntimeError: no such kernel"
    assert "WRONG: x: RuntimeError: no such kernel" in capsys.readouterr().out
    # Neither is measured again, and the status is the same; unless it is asked for.
    assert run(path, x=lambda: pair("x"), y=fine) == 1
    assert run(path, again=True, x=lambda: pair("x"), y=fine) == 0
    assert calls == ["y"]


def test_a_wrong_row_fails_the_run_that_takes_it_up_too(path):
    assert run(path, x=lambda: pair("x", green=False)) == 1
    assert run(path, x=broken) == 1
    assert run(path, y=lambda: pair("y")) == 0  # x was not asked for


def test_nothing_measured_is_a_failure(path, capsys):
    from rows import Skipped

    def skipped():
        raise Skipped("it needs 9 MiB and 1 are free")

    assert run(path, x=lambda: []) == 1
    assert rows_at(path).all[0]["failed"] == "RuntimeError: nothing could be measured"
    assert run(path, z=skipped) == 1
    assert "skipped: z: it needs 9 MiB" in capsys.readouterr().err
    assert run(path, z=skipped, y=lambda: pair("y")) == 0
    assert run(path) == 1


def test_after_its_time_a_run_begins_nothing_and_goes_on_later(path, capsys):
    cases = {"x": lambda: pair("x"), "y": lambda: pair("y")}
    assert run(path, minutes=0, **cases) == 3
    assert "time is up: 2 of 2 cases are left; the same command goes on" in capsys.readouterr().err
    assert run(path, **cases) == 0
    assert run(path, minutes=0, **cases) == 0


def test_a_row_that_contradicts_its_key_is_refused(path):
    """It would be measured again and again."""
    assert run(path, x=lambda: pair("y")) == 1
    assert "says otherwise of itself" in rows_at(path).all[0]["failed"]


def test_a_lost_gpu_ends_the_run(path, monkeypatch, capsys):
    import rows

    monkeypatch.setattr(rows, "is_lost", lambda device: True)
    assert run(path, x=broken, y=lambda: pair("y")) == 1
    assert "the GPU answers this process no more: 1 of 2 cases are left" in capsys.readouterr().err


# --- the start --------------------------------------------------------------------------------------------------------


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    from measure import add_run_arguments

    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--results", str(folder), *more])


def test_results_that_cannot_be_written_are_refused_before_anything_runs(tmp_path):
    from measure import start

    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"results cannot be written to .*file.* give another folder"):
        start(arguments(tmp_path / "file"))


def test_a_missing_compiler_or_header_is_named_before_the_first_kernel(tmp_path, monkeypatch):
    import measure

    monkeypatch.setattr(measure, "no_card", lambda: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SystemExit, match="Triton needs a C compiler and finds no gcc and no clang: install gcc"):
        measure.start(arguments(tmp_path, "--device", "cuda"))
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit, match=r"Triton needs .*Python\.h: install python3-dev"):
        measure.start(arguments(tmp_path, "--device", "cuda"))


def test_tuned_tiles_are_those_of_the_results(tmp_path, monkeypatch):
    import measure

    monkeypatch.setattr(measure, "no_card", lambda: "")
    monkeypatch.setattr(measure, "no_compiler", lambda: "")
    monkeypatch.setattr(measure, "device_slug", lambda device: "card")
    monkeypatch.setenv("MLPOOL_TILES", "")  # so that it is put back
    monkeypatch.delenv("MLPOOL_TILES")
    assert measure.tiles() == "default"
    measure.start(arguments(tmp_path, "--device", "cuda"))
    assert measure.tiles() == "default"
    (tmp_path / "tiles-card.json").write_text("{}")
    measure.start(arguments(tmp_path, "--device", "cuda"), tuned=False)
    assert measure.tiles() == "default"
    measure.start(arguments(tmp_path, "--device", "cuda"))
    first = measure.tiles()
    assert len(first) == 10
    (tmp_path / "tiles-card.json").write_text('{"mean": {}}')
    assert measure.tiles() != first


def test_tiles_that_are_not_there_are_said(tmp_path, monkeypatch):
    import measure

    monkeypatch.setenv("MLPOOL_TILES", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match=r"none\.json is no file: unset it"):
        measure.start(arguments(tmp_path))


def test_the_digest_of_the_code_changes_with_a_source(tmp_path, monkeypatch):
    import measure

    monkeypatch.setattr(measure, "_ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "mix.py"
    digests = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        digests.append(measure.code())
    assert digests[0] == digests[2] != digests[1]


# --- check, tests, summary --------------------------------------------------------------------------------------------


def test_check_names_what_is_missing_or_too_old(tmp_path, monkeypatch, capsys):
    import check

    found = dict.fromkeys(check.NEEDED, "99.0") | {"sentence-transformers": "6.0.1", "triton": "3.6.0"}
    del found["peft"]
    monkeypatch.setattr(check.doctor, "installed", found.get)
    monkeypatch.setattr(check, "no_card", lambda: "there is no CUDA GPU here")
    assert check.main(["--results", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if line.startswith("MISSING")]
    assert missing == [
        "MISSING there is no CUDA GPU here",
        "MISSING sentence-transformers 6.0.1 is too old for gpu-encode, gpu-train; pip install "
        "'sentence-transformers>=6.2'",
        "MISSING peft is missing for gpu-train; pip install 'peft>=0.20'",
    ]
    assert "ok      triton 3.6.0" in lines


TESTS = """
import os, pytest
def test_good(): print("noise")
def test_bad(): assert 1 == 2
def test_kills(): os.abort()
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


def test_gpu_tests_survive_a_dying_process_and_run_none_twice(tmp_path, capsys):
    import gpu_tests

    file = tmp_path / "test_few.py"
    file.write_text(TESTS)
    options = ["--device", "cpu", "--mark", "", "--jobs", "1", "--results", str(tmp_path), str(file)]
    assert gpu_tests.main(options) == 1
    assert "2 passed" not in (out := capsys.readouterr().out)
    assert "1 passed, 1 skipped, 2 failed, 0 left" in out
    (path,) = tmp_path.glob("gpu-test-*.csv")
    with path.open(newline="") as read:
        rows = {row["test"].split("::")[1]: row for row in csv.DictReader(read)}
    assert {name: row["green"] for name, row in rows.items()} == {
        "test_good": "True", "test_bad": "False", "test_kills": "False", "test_skipped": "True",
    }  # fmt: skip
    assert "assert 1 == 2" in rows["test_bad"]["failed"]
    assert "the process died" in rows["test_kills"]["failed"]
    # Nothing is run twice but what failed: another run of the good test would be seen.
    text = TESTS.replace('print("noise")', "assert 0")
    file.write_text(text.replace("1 == 2", "1 == 1").replace("os.abort()", "pass"))
    assert gpu_tests.main([*options, "--again"]) == 0
    assert "3 passed, 1 skipped, 0 failed, 0 left" in capsys.readouterr().out


def test_summary_shows_the_designs_targets_beside_what_was_reached(tmp_path, capsys):
    import summary
    from rows import Rows

    card = FACTS | {"device": "NVIDIA H100"}
    here = {"preset": "mistral-7b", "mode": "eval", "batch": 64, "dtype": "bfloat16", "case": "mistral-7b B=64 eval"}
    old = Rows(tmp_path / "throughput-h100-full.csv", card | {"code": "old"})
    old.add(here | {"provider": "mlpool", "green": True, "ratio_eager": 9.9, "median_ms": 1.0})
    rows = Rows(tmp_path / "throughput-h100-full.csv", card)
    rows.add(
        here | {"provider": "mlpool", "green": True, "ratio_eager": 4.25, "ratio_compiled": 3.5, "median_ms": 20.0}
    )
    training = here | {"mode": "forward+backward", "provider": "mlpool save", "green": False, "failed": "out of bounds"}
    rows.add(training | {"case": "mistral-7b B=64 forward+backward"})
    assert summary.main([str(tmp_path)]) == 0
    page = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert ["mistral-7b B=64 eval", "mlpool", ">= 4.20x eager", "4.25x", "met"] in lines
    assert ["mistral-7b B=64 eval", "mlpool", ">= 3.80x compiled", "3.50x", "MISSED"] in lines
    assert ["mistral-7b B=64 forward+backward", "mlpool save", ">= 3.50x eager", "", "WRONG, no speed"] in lines
    assert ["qwen2-0.5b B=256 eval", "mlpool", ">= 8.00x eager", "", "not measured"] in lines
    assert "1 rows of other code, versions or tiles are not shown" in page
    assert "9.90x" not in page


def test_summary_of_nothing_says_so(tmp_path):
    import summary

    with pytest.raises(SystemExit, match=r"no rows in .*: no benchmark has run"):
        summary.main([str(tmp_path)])
