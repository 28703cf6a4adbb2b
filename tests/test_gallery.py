"""The gallery is what the CSV files give: every file on the page, every figure byte by byte."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import gallery
import pytest
from docs_blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def measured_row(provider: str, milliseconds: str, **more: str) -> dict[str, str]:
    same = {"case": "a", "batch": "8", "extra_mib": "2", "ratio_eager": "1", "memory_share": "1", "date": "2026-01-02"}
    return {**same, "provider": provider, "median_ms": milliseconds, "green": "True", "device": "a card", **more}


def test_the_page_and_its_figures_are_those_of_the_files():
    made = gallery.made()
    for path, text in made.items():
        assert path.read_text(encoding="utf8") == text, f"{path.name} is behind its CSV file: make plots"
    assert {path for path in made if path.suffix == ".svg"} == set(gallery.FOLDER.glob("*.svg"))


def test_every_file_of_results_has_a_figure_a_command_and_a_day():
    page = gallery.PAGE.read_text(encoding="utf8")
    for path in RESULTS.glob("*.csv"):
        said = page.partition(f"`{path.name}`: ")[2].partition("\n#")[0].partition("\n`")[0]
        assert re.search(r"\d{4}-\d\d-\d\d", said), path.name
        assert re.search(r"^    (make|python|mlpool) \S+", said, re.MULTILINE), path.name
        assert re.search(rf"!\[\w[^\]]+\]\(figures/gallery/{path.stem}\.svg\)", said), path.name


def test_a_changed_row_changes_the_figure_and_a_wrong_one_is_left_out(tmp_path):
    path = tmp_path / "throughput-card-full.csv"
    bar, note = ("13.7 ms", "2×")
    write(path, [measured_row("eager", "27.4"), measured_row("mlpool", "13.7", ratio_eager="2")])
    before = gallery.made(tmp_path)
    figure = before[gallery.FOLDER / "throughput-card-full.svg"]
    assert f"{bar} · {note}" in figure
    assert figure.count("<rect") == 4  # time and memory
    ours = next(line for line in figure.split("\n") if note in line)
    assert f'fill="{gallery.OURS}"' in ours
    wrong = measured_row("mlpool", "0.1", green="False")
    write(path, [measured_row("eager", "27.4"), measured_row("mlpool", "13.7", ratio_eager="2"), wrong])
    after = gallery.made(tmp_path)
    assert after[gallery.FOLDER / "throughput-card-full.svg"] == figure
    assert "3 rows; 1 wrong or failed rows are not shown" in after[gallery.PAGE]
    assert "a card, 2026-01-02" in after[gallery.PAGE]
    write(path, [measured_row("eager", "54.8"), measured_row("mlpool", "13.7", ratio_eager="2")])
    assert gallery.made(tmp_path)[gallery.FOLDER / "throughput-card-full.svg"] != figure


def test_a_file_that_nobody_shows_is_an_error(tmp_path):
    write(tmp_path / "novel-card.csv", [measured_row("mlpool", "1")])
    with pytest.raises(LookupError, match=r"novel-card\.csv stands in no section"):
        gallery.made(tmp_path)
    (tmp_path / "novel-card.csv").unlink()
    write(tmp_path / "throughput-card.csv", [measured_row("mlpool", "1", green="False")])
    with pytest.raises(ValueError, match=r"throughput-card\.csv has no row to show"):
        gallery.made(tmp_path)


def test_batches_and_markup_are_told_apart():
    rows = [measured_row("mlpool", "1", case="a<b"), measured_row("mlpool", "1", case="a<b", batch="16")]
    bars = gallery.measured("median_ms", gallery.milliseconds)(rows)
    assert [bar.group for bar in bars] == ["a<b, batch 8", "a<b, batch 16"]
    drawn = gallery.svg({"time": bars}, "<")
    assert "a&lt;b, batch 8" in drawn
    assert "<title>&lt;</title>" in drawn


def test_the_axis_is_logarithmic_where_the_range_is_wide():
    at, lines = gallery.scale([1.0, 29.0])
    assert (at(0), at(29.0), lines) == (0, gallery.PANEL, [])
    at, lines = gallery.scale([1.0, 1000.0])
    assert (lines[-1], at(1000.0)) == (1000, gallery.PANEL)
    assert at(100.0) - at(10.0) == pytest.approx(at(10.0) - at(1.0))
