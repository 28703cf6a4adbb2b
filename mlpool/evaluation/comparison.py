"""What a comparison found, as tables: in a terminal, in Markdown, as CSV; and how to read them."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from ..show import markdown
from .forest import forest

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table.

    baseline: label. table: one row per model × task type. datasets: one row per model × data set. notes: how to read
    them, and what was left out. alpha: the level. In both lists a cell that does not apply is None, never NaN.
    """

    baseline: str
    table: list[Row]
    datasets: list[Row]
    notes: list[str]
    alpha: float

    def __str__(self) -> str:
        return "\n\n".join([_terminal(self.table, _TABLE), *self.notes])

    __repr__ = __str__

    def by_data_set(self) -> str:
        """The table with a row per model × data set."""
        return _terminal(self.datasets, _DATASETS)

    def markdown(self) -> str:
        """Both tables and the notes."""
        parts = [
            f"# Compared with {self.baseline}", "## By task type", markdown(_cells(self.table, _TABLE)),
            "## By data set", markdown(_cells(self.datasets, _DATASETS)),
            "## How to read it", "\n".join(f"- {note}" for note in self.notes),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def to_csv(self, path: str | Path | None = None, rows: list[Row] | None = None) -> str:
        """`table` (or `rows`, say `comparison.datasets`) as CSV, full precision; written to `path` if one is given."""
        rows = self.table if rows is None else rows
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if path is not None:
            write_text(path, text.getvalue())
        return text.getvalue()

    def save(self, directory: str | Path) -> list[Path]:
        """Write comparison.md, comparison.csv, per_dataset.csv and forest.png; returns their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / name for name in ("comparison.md", "comparison.csv", "per_dataset.csv", "forest.png")]
        write_text(paths[0], self.markdown())
        self.to_csv(paths[1])
        self.to_csv(paths[2], self.datasets)
        forest(self, paths[3])
        return paths


def reading(table: list[Row], datasets: list[Row], alpha: float) -> list[str]:
    """How to read the tables, and what they cannot show."""
    notes = [
        "A data set is the unit: scores are averaged over seeds first. sd: spread over seeds, averaged over data sets.",
        "p: Wilcoxon's exact two-sided signed-rank test over data sets; least p: the smallest this many data sets can "
        f"reach. Verdicts are at {alpha:g} after Holm over all {len(table)} tests (models × task types). “No "
        "difference shown” is not “equal”.",
        "[low, high]: 95 % Student t interval of the mean difference, each for itself (not corrected); too short when "
        "differences are strongly skewed. r: matched-pairs rank-biserial correlation, from -1 to 1.",
    ]
    if any("1" in (row["model_seeds"], row["baseline_seeds"]) for row in table):
        notes.append("One seed: what is shown is about the model that was trained, not about how it was trained.")
    tested = [row for row in datasets if row["p"] is not None]
    if tested:
        words = [row["verdict"].split()[0] for row in tested]
        notes.append(
            f"Tests over items: paired randomisation, {tested[0]['permutations']} permutations, Holm over "
            f"{len(tested)} tests: {words.count('higher')} higher, {words.count('lower')} lower. Each speaks of its "
            "data set alone."
        )
    if len(tested) < len(datasets):
        notes.append(f"{len(datasets) - len(tested)} of {len(datasets)} rows by data set have no test over items.")
    return notes


def number(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _score(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model"],
    "task type": lambda r: r["task_type"],
    "n": lambda r: str(r["n"]),
    "data set": lambda r: r["task"],
    "metric": lambda r: r["metric"] or "–",
    "baseline": lambda r: _score(r["baseline_score"]),
    "score": lambda r: _score(r["model_score"]),
    "difference": lambda r: _score(r["difference"], "+"),
    "[low, high]": lambda r: "–" if r["low"] is None else f"[{r['low']:+.4f}, {r['high']:+.4f}]",
    "+/−/=": lambda r: f"{r['wins']}/{r['losses']}/{r['ties']}",
    "r": lambda r: f"{r['effect']:+.2f}",
    "items": lambda r: "–" if r["items"] is None else str(r["items"]),
    "p": lambda r: number(r["p"]),
    "least p": lambda r: number(r["smallest_p"]),
    "Holm": lambda r: number(r["p_holm"]),
    "seeds": lambda r: f"{r['model_seeds']}:{r['baseline_seeds']}",
    "sd": lambda r: f"{_score(r['model_seed_sd'])} : {_score(r['baseline_seed_sd'])}",
    "verdict": lambda r: r["verdict"],
}
_TABLE = (
    "model", "task type", "n", "baseline", "score", "difference", "[low, high]", "+/−/=", "r", "p", "least p", "Holm",
    "seeds", "sd", "verdict",
)  # fmt: skip
_DATASETS = (
    "model", "task type", "data set", "metric", "baseline", "score", "difference", "sd", "items", "p", "least p",
    "Holm", "verdict",
)  # fmt: skip


def _cells(rows: list[Row], columns: Sequence[str]) -> list[list[str]]:
    """A header and a line per row; columns that say nothing anywhere are left out."""
    lines = [list(columns), *([_COLUMNS[name](row) for name in columns] for row in rows)]
    useful = [i for i, column in enumerate(zip(*lines[1:], strict=True)) if set(column) - {"–", "– : –"}]
    return [[line[i] for i in useful] for line in lines]


def _terminal(rows: list[Row], columns: Sequence[str]) -> str:
    """Aligned, the models one under the other with a heading each."""
    header, *body = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)][1:]
    parts = []
    for model in dict.fromkeys(line[0] for line in body):
        lines = [header[1:], ["─" * width for width in widths], *(line[1:] for line in body if line[0] == model)]
        parts.append(f"{model} compared with {rows[0]['baseline']}\n")
        parts += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        parts.append("")
    return "\n".join(parts[:-1])
