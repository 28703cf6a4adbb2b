"""The numbers of README and docs are those of the committed CSV files, or stand beside the command that prints them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import results
from docs_blocks import FENCE, INDENTED, PAGES, ROOT

# A score, a ratio, a time, a size: what somebody measured or computed.
NUMBER = re.compile(
    r"(?<![\w.])[+−-]?\d+\.\d{2,}\b"
    r"|\d[\d.,]*\s?(?:×|x\b|(?:ms|µs|s|min|minutes|seconds|MiB|GiB|MB|GB|texts/s|texts a second|%)(?!\w))"
)
# What looks like one and is none: versions, papers, code.
OTHER = re.compile(
    r"(?:Python|torch|vLLM|[Tt]riton|(?:sentence-)?transformers|mlpool) [\d.]+|\d{4}\.\d{5}|`[^`]*`|\$[^$]*\$",
    re.DOTALL,
)
PRINTS = r"make \w|mlpool (?:study|layers|mine|fit|eval|compare) |python (?:benchmarks|examples)/\w|pytest tests/\w"
COMMAND = re.compile(rf"(?:^ {{4,}}|`)[^`\n]*?\b(?:{PRINTS})", re.MULTILINE)
MARKS = re.compile(r"<!-- (results \S+|attention-matrix|census-\S+) -->\n.*?<!-- /\S+ -->", re.DOTALL)
# Sections whose numbers nobody measures, and why.
KNOWN = {
    "doctor.md, `mlpool init`": "follows from the formula beside it",
    "kernels.md, Kernels and the cost model": "sizes that follow from the shapes",
    "memory.md, Quantised bases": "a bound of the self-test, _MOST_NOISE in attention/probe.py",
    "scale.md, Beside the GPUs": "its table names tests/cluster/measure.py; the last line was timed by hand",
    "scale.md, GPUs": "computed there from one row of measured.md, by the formulas beside the numbers",
    "scale.md, What breaks first": "computed from the numbers above, by the formulas beside them",
    "pools.md, The mathematics": "the bound that the section on limits has numbers of",
}


def sections(page: Path) -> dict[str, str]:
    """Heading → text, without what is made from CSV files (held to them above) and without fenced code."""
    text = MARKS.sub("", FENCE.sub("", page.read_text(encoding="utf8")))
    first, *others = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {"": first, **dict(zip(others[::2], others[1::2], strict=True))}


def unproved(text: str) -> list[str]:
    """Numbers of a section that names no command."""
    return [] if COMMAND.search(text) else NUMBER.findall(OTHER.sub("", INDENTED.sub("", text)))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_marked_numbers_are_those_of_the_files(page):
    text = page.read_text(encoding="utf8")
    assert results.written(text) == text, f"{page.name} is behind its CSV files: make plots"
    assert text.count("<!-- results ") == text.count("<!-- /results -->") == len(results.MARKED.findall(text))


def test_a_changed_number_shows():
    text = Path(ROOT / "docs/measured.md").read_text(encoding="utf8")
    assert results.written(re.sub(r"\*\*\d", "**7", text, count=1)) == text


def test_a_row_that_is_wrong_is_not_shown(tmp_path):
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


def test_numbers_are_written_for_people():
    assert [results.milliseconds(n) for n in ("0.642", "157.74", "23706.2")] == ["0.642 ms", "158 ms", "23.7 s"]
    assert [results.mebibytes(n) for n in ("26.75", "9561.95")] == ["26.8 MiB", "9.34 GiB"]
    assert [results.times(n) for n in (0.651, 17.02, 110.27)] == ["0.651×", "17×", "110×"]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_number_without_a_mark_stands_beside_its_command(page):
    """That the command parses is tested in test_docs.py."""
    found = {f"{page.name}, {heading}": unproved(text) for heading, text in sections(page).items()}
    bare = {place: numbers for place, numbers in found.items() if numbers}
    assert bare.keys() - KNOWN == set(), f"{bare}: name the command that prints them, or put them between results marks"
    assert {place for place in KNOWN if place.startswith(f"{page.name},")} <= bare.keys(), "no longer needed in KNOWN"


@pytest.mark.parametrize(
    "text", ["It is 4.2× as fast.", "| a | 0.653 |", "takes 12 s", "of 7 GiB", "80 % less", "1.5 texts/s", "a −0.031 b"]
)
def test_what_counts_as_a_number(text):
    assert unproved(text)
    assert not unproved(f"{text}\n\n    make bench\n")
    assert not unproved(f"{text} (`python benchmarks/fit.py`)")


@pytest.mark.parametrize("text", ["torch 2.11 and Python 3.11", "arXiv 2409.02727", "`lr=0.05`", "3 seeds", "$0.05$"])
def test_what_does_not(text):
    assert not unproved(text)
