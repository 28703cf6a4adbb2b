"""The numbers of README and docs are those of the committed CSV files."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import pytest
from docs_blocks import PAGES, ROOT


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("docs_results", ROOT / "docs/site/results.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_marked_numbers_are_those_of_the_files(page, results):
    text = page.read_text(encoding="utf8")
    assert results.written(text) == text, f"{page.name} is behind its CSV files: make plots"
    assert text.count("<!-- results ") == text.count("<!-- /results -->") == len(results.MARKED.findall(text))


def test_a_changed_number_shows(results):
    text = Path(ROOT / "docs/measured.md").read_text(encoding="utf8")
    assert results.written(re.sub(r"\*\*\d", "**7", text, count=1)) == text


def test_a_row_that_is_wrong_is_not_shown(results, tmp_path):
    fields = ("case", "provider", "green", "median_ms")
    rows = [("a", "mlpool", "True", "2"), ("a", "mlpool", "False", ""), ("a", "eager", "False", "")]
    with (tmp_path / "x-card-full.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([fields, *rows])
    lines = results.lines("x", "card", tmp_path)
    assert results.row(lines, "a", "mlpool")["median_ms"] == "2"
    assert results.row(lines, "a", "eager") is None
    with pytest.raises(FileNotFoundError, match=r"y-card\.csv"):
        results.lines("y", "card", tmp_path)


def test_numbers_are_written_for_people(results):
    assert [results.milliseconds(n) for n in ("0.642", "157.74", "23706.2")] == ["0.642 ms", "158 ms", "23.7 s"]
    assert [results.mebibytes(n) for n in ("26.75", "9561.95")] == ["26.8 MiB", "9.34 GiB"]
    assert [results.times(n) for n in (0.651, 17.02, 110.27)] == ["0.651×", "17×", "110×"]
