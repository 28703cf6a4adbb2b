"""The page of a study's report: what its template shows, as plain values. The markup is in templates/report.html."""

from __future__ import annotations

import base64
import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..evaluation import results
from ..files import write_text
from ..version import versions_line
from .config import UNTRAINED
from .report import COMPARISON, MARKS, Found, cost_table, headline, is_baseline, profiles, spread, summary

_PACKAGES = ("mlpool", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy", "scipy")
_PALE = 0.02  # differences in score up to here are never in full colour


@dataclass
class Cell:
    """spread: what stands small behind the text. shade: 0 to 1, how deep its colour is. mark, word: "▲", "higher"."""

    text: str
    spread: str = ""
    classes: str = ""
    shade: float | None = None
    mark: str = ""
    word: str = ""


@dataclass
class Row:
    name: str
    cells: list[Cell]


@dataclass
class Table:
    header: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    caption: str = ""

    @classmethod
    def plain(cls, lines: Sequence[Sequence[str]], caption: str, classes: str = "") -> Table:
        """Of a header and lines of text; classes "text": of words, not of numbers."""
        rows = [Row(name, [Cell(cell, classes=classes) for cell in cells]) for name, *cells in lines[1:]]
        return cls(lines[0], rows, caption)


def write(found: Found, command: str) -> list[Path]:
    """Write report.html, summary.md and the comparison's files into the output folder; returns their paths."""
    output = found.study.output
    paths = [output / "report.html", output / "summary.md"]
    forest = None
    if found.comparison:
        paths += found.comparison.save(output / COMPARISON)
        forest = output / COMPARISON / "forest.png"
    write_text(paths[0], page(found, command, forest))
    write_text(paths[1], summary(found))
    return paths


def page(found: Found, command: str, forest: Path | None) -> str:
    """The HTML of the report, which needs nothing else. command: that made it. forest: the plot, if there is one."""
    import jinja2

    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html").render(_values(found, command, forest))


def _values(found: Found, command: str, forest: Path | None) -> dict[str, Any]:
    study = found.study
    done, planned = sum(map(len, found.notes.values())), len(study.entries) * len(study.seeds)
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    unfinished = "" if done == planned else f" ({done} of {planned} trainings finished)"
    trained = [(entry.label, entry.label + is_baseline(found, entry)) for entry in found.entries]
    before = [(UNTRAINED.format(e.label), e.label) for e in found.entries if UNTRAINED.format(e.label) in found.scores]
    return {
        "title": study.title,
        "headline": headline(found),
        "trained": f"{len(study.entries)} designs, {seeds}{unfinished}",
        "base": study.base,
        "scores": _scores(
            found, trained,
            "Best of a column in bold. Blue is above the baseline, orange below, deeper for larger differences. ▲ ▼: "
            "shown to be higher or lower on this data set by a paired randomisation test over its items, after Holm's "
            "correction over all of them; it speaks of these trained models and this data set alone.",
        ),
        "untrained": before and _scores(
            found, before, "The same before training, coloured against the trained baseline."
        ),
        "forest": _forest(found, forest),
        "read": _read(found),
        "costs": _costs(found),
        **_search(found),
        "matched": found.matched,
        "command": command,
        "again": str(study.output / "study.yaml"),
        "facts": _facts(found),
        "config": yaml.safe_dump(study.source, sort_keys=False, allow_unicode=True),
        "results_file": results.FILE_NAME,
        "comparison_folder": COMPARISON,
    }  # fmt: skip


def _scores(found: Found, lines: Sequence[tuple[str, str]], caption: str) -> Table:
    """A line per (label, shown name), coloured by the difference to the baseline."""
    verdicts = found.verdicts()
    columns: dict[str, Any] = {"mean": found.means}
    columns |= {task: lambda label, task=task: found.scores[label][task] for task in found.tasks}
    level = {name: fmean(of(found.study.baseline)) for name, of in columns.items()}
    best = {name: max(fmean(of(label)) for label, _ in lines) for name, of in columns.items()}
    off = {(label, name): fmean(of(label)) - level[name] for name, of in columns.items() for label, _ in lines}
    largest = max(_PALE, *map(abs, off.values()))
    table = Table(["design", *columns], caption=caption)
    for label, shown in lines:
        cells = []
        for name, of in columns.items():
            word = verdicts.get((label, name), "")
            cell = _colored(off[label, name], 0.42 / largest)
            cell.text, _, small = spread(of(label)).partition(" ")
            cell.spread, cell.word, cell.mark = small, word, MARKS.get(word, "")
            cell.classes += " best" if fmean(of(label)) == best[name] else ""
            cells.append(cell)
        table.rows.append(Row(shown, cells))
    return table


def _colored(difference: float, factor: float) -> Cell:
    """Blue for more, orange for less."""
    if not difference:
        return Cell("")
    return Cell("", classes="up" if difference > 0 else "down", shade=factor * abs(difference))


def _forest(found: Found, path: Path | None) -> dict[str, Any] | None:
    if not found.comparison or path is None:
        return None
    rows = found.comparison.table
    alt = "; ".join(f"{r['model']}, {r['task_type']}: {r['difference']:+.4f}, {r['verdict']}" for r in rows)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"alt": alt, "data": data, "notes": found.comparison.notes}


def _read(found: Found) -> Table | None:
    read = profiles(found)
    if not read:
        return None
    layers = sorted({layer for shares, _ in read.values() for layer in shares})
    # Against even reading; what is within a half of it is pale.
    off = {
        label: {layer: share * len(shares) - 1 for layer, share in shares.items()}
        for label, (shares, _) in read.items()
    }
    largest = max(0.5, *(abs(value) for row in off.values() for value in row.values()))
    texts = next(n["profile"]["texts"] for notes in found.notes.values() for n in notes if n.get("profile"))
    table = Table(
        ["design", *(f"layer {layer}" for layer in layers), "cosine with plain pooling"],
        caption="Share of each layer in what the trained pool adds up, its weight times the length of what it "
        "carries; blue is more than an even share, orange less. Last, how near the embedding is to that of plain "
        "pooling, which a residual pool starts from: 1 where the pool changes nothing. "
        f"Over {texts} texts, mean over heads and seeds.",
    )
    for label, (shares, cosine) in read.items():
        cells = []
        for layer in layers:
            cell = _colored(off[label].get(layer, 0), 0.5 / largest)
            cell.text = f"{shares[layer]:.3f}" if layer in shares else "not read"
            cells.append(cell)
        table.rows.append(Row(label, [*cells, Cell("–" if cosine is None else f"{cosine:.4f}")]))
    return table


def _costs(found: Found) -> Table:
    first = next(iter(found.notes.values()))[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}"
    return Table.plain(
        cost_table(found),
        f"Mean over seeds, on {where}. Training without loading and saving where the trainer noted it; texts/s of "
        "encoding the evaluated texts; peak memory of training above what the process took before it (CUDA: tensors).",
    )


def _search(found: Found) -> dict[str, Table | None]:
    if not found.recipes:
        return {"chosen": None, "tried": None}
    lines = [["for", "chosen", "score on dev", "searched with"]]
    tried = [["for", "recipe", "score on dev"]]
    for group, one in found.recipes.items():
        lines.append([group, _recipe(one["recipe"]), f"{one['score']:.4f}", ", ".join(one["searched_with"])])
        tried += [[group, _recipe(t["recipe"]), f"{t['score']:.4f}"] for t in one["tried"]]
    search = found.study.search
    steps = f"{search['max_steps']} steps" if search.get("max_steps") else "as many steps"
    caption = (
        f"Chosen on development data alone ({', '.join(search['tasks'] or ['all'])}, split {search['split']}), by "
        f"trainings of {steps} with seed {found.study.seeds[0]}."
    )
    return {"chosen": Table.plain(lines, caption, "text"), "tried": Table.plain(tried, "Mean over tasks.", "text")}


def _recipe(recipe: dict[str, Any]) -> str:
    listed = (f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in recipe.items())
    return ", ".join(listed) or "as in the config"


def _facts(found: Found) -> dict[str, str]:
    inputs = dict(found.study.inputs)
    return {
        "base": f"{found.study.base} ({inputs.pop(found.study.base, 'of the Hub')})",
        "data": "; ".join(f"{name} ({digest})" for name, digest in inputs.items()),
        "versions": versions_line(*_PACKAGES),
        "machine": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }
