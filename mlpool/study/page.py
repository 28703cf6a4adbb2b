"""The page of a study's report: what its template shows, as plain values. The markup is in templates/report.html."""

import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ..evaluation import results
from ..evaluation.comparison import number
from ..evaluation.forest import reach, verdict
from ..evaluation.statistics import mean_interval
from ..files import write_text
from ..version import versions_line
from .config import UNTRAINED
from .report import COMPARISON, MARKS, Found, cost_table, headline, is_baseline, profiles, spread, summary
from .tables import Cell, Line, Row, Table

_PACKAGES = ("mlpool", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy", "scipy")
_PALE = 0.02  # differences in score up to here are never in full colour
_BREAKS = r"(?<=[/_-])|(?<=[a-z])(?=[A-Z])"  # where a long name of a data set may be broken
_WIDE = 12  # more tasks than these have a table for each type


def write(found: Found, command: str) -> list[Path]:
    """Write report.html, summary.md and the comparison's files into the output folder; returns their paths."""
    output = found.study.output
    paths = [output / "report.html", output / "summary.md"]
    if found.comparison:
        paths += found.comparison.save(output / COMPARISON)
    write_text(paths[0], page(found, command))
    write_text(paths[1], summary(found))
    return paths


def page(found: Found, command: str) -> str:
    """The HTML of the report, which needs nothing else, nor JavaScript for anything it says. command: that made it."""
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["broken"] = lambda name: Markup("<wbr>").join(re.split(_BREAKS, name))
    return environment.get_template("report.html").render(_values(found, command))


def _values(found: Found, command: str) -> dict[str, Any]:
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
        "metrics": [_metric(found, name, tasks) for name, tasks in found.metrics().items()],
        "forest": _forest(found),
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


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(found: Found, lines: Sequence[tuple[str, str]], caption: str) -> list[Table]:
    """Designs × tasks with their means, a line per (label, shown name), coloured by the difference to the baseline.

    Of many tasks the means first, then a table for each type, so that each fits a page.
    """
    metrics = found.metrics()
    off = [fmean(found.means(label, t)) - _baseline(found, t) for t in metrics.values() for label, _ in lines]
    factor = 0.42 / max(_PALE, *map(abs, off))
    if len(found.tasks) <= _WIDE:
        return [_heat(found, "Scores", lines, metrics, factor, caption)]
    means = {name: tasks for name, tasks in metrics.items() if len(tasks) > 1}
    return [_heat(found, "Mean scores", lines, means, factor, caption)] + [
        _heat(found, f"Scores, {kind}", lines, {task: [task] for task in tasks}, factor, kind)
        for kind, tasks in found.groups.items()
    ]


def _heat(
    found: Found, name: str, lines: Sequence[tuple[str, str]], metrics: Mapping[str, list[str]], factor: float,
    caption: str,
) -> Table:  # fmt: skip
    verdicts = found.verdicts()
    best = {metric: max(fmean(found.means(label, t)) for label, _ in lines) for metric, t in metrics.items()}
    table = Table(name, ["design", *metrics], caption=caption)
    for label, shown in lines:
        cells = []
        for metric, tasks in metrics.items():
            values = found.means(label, tasks)
            word = verdicts.get((label, metric), "")
            cell = _colored(fmean(values) - _baseline(found, tasks), factor)
            cell.text, _, cell.spread = spread(values).partition(" ")
            cell.word, cell.mark, cell.value = word, MARKS.get(word, ""), fmean(values)
            cell.classes += " best" if cell.value == best[metric] else ""
            cell.told = _told(found, label, metric, tasks)
            cells.append(cell)
        table.rows.append(Row(shown, cells))
    return table


def _baseline(found: Found, tasks: Sequence[str]) -> float:
    return fmean(found.means(found.study.baseline, tasks))


def _colored(difference: float, factor: float) -> Cell:
    """Blue for more, orange for less."""
    if not difference:
        return Cell("")
    return Cell("", classes="up" if difference > 0 else "down", shade=factor * abs(difference))


def _told(found: Found, label: str, metric: str, tasks: Sequence[str]) -> str:
    """A score with all that belongs to it, a line each: seeds, interval, difference to the baseline, its test."""
    values = found.means(label, tasks)
    said = [f"{label}, {metric}", f"score {fmean(values):.4f}"]
    if len(values) > 1:
        said.append(f"by seed {', '.join(f'{value:.4f}' for value in values)}{_interval(values, '.4f')}")
    if label != found.study.baseline:
        off = found.differences(label, tasks)
        said.append(f"{fmean(values) - _baseline(found, tasks):+.4f} to the baseline{_interval(off, '+.4f')}")
    rows = found.comparison.datasets if found.comparison else []
    for row in rows:
        if (row["model"], [row["task"]]) == (label, list(tasks)) and row["p"] is not None:
            after = f"p = {number(row['p'])}, after Holm {number(row['p_holm'])}"
            said.append(f"over {row['items']} items {after}: {row['verdict']}")
    return "\n".join(said)


def _interval(values: Sequence[float], form: str) -> str:
    interval = mean_interval(values)
    return f"; mean within {interval[0]:{form}} to {interval[1]:{form}} (95 %, {len(values)} seeds)" if interval else ""


# --- drawn beside their numbers ---------------------------------------------------------------------------------------


def _metric(found: Found, name: str, tasks: Sequence[str]) -> Table:
    """Every design by one metric: the mean with its interval over seeds, and each seed."""
    values = {entry.label: found.means(entry.label, tasks) for entry in found.entries}
    every = [value for of_design in values.values() for value in of_design]
    margin = 0.15 * (max(every) - min(every)) or 0.01
    scale = min(every) - margin, max(every) + margin
    header = ["design", f"{scale[0]:.3f} to {scale[1]:.3f}", "score", "to the baseline"]
    table = Table(f"Designs by {name}", header)
    for entry in found.entries:
        of_design = values[entry.label]
        mean, baseline = fmean(of_design), _baseline(found, tasks)
        dots = of_design if len(of_design) > 1 else ()
        drawn = Line.on(scale, mean, baseline, mean_interval(of_design), dots)
        text, _, small = spread(of_design).partition(" ")
        off = "–" if entry.label == found.study.baseline else f"{mean - baseline:+.4f}"
        cells = [Cell("", value=mean, line=drawn), Cell(text, small, value=mean), Cell(off)]
        table.rows.append(Row(entry.label + is_baseline(found, entry), cells))
    return table


def _forest(found: Found) -> dict[str, Any] | None:
    """Mean differences to the baseline with their intervals, a row per design × task type."""
    if not found.comparison:
        return None
    rows = found.comparison.table
    limit = reach(rows)
    header = ["design", "task type", f"-{limit:.3f} to {limit:.3f}", "difference", "95 % interval", "data sets"]
    table = Table(
        "Differences to the baseline, by task type", header,
        caption="A data set is the unit: with few of them little can be shown; the last column says where. A "
        "filled point: a difference is shown after Holm.",
    )  # fmt: skip
    for row in rows:
        interval = None if row["low"] is None else (row["low"], row["high"])
        solid = row["verdict"].startswith(("higher", "lower"))
        drawn = Line.on((-limit, limit), row["difference"], 0, interval, solid=solid)
        between = f"{row['low']:+.4f} to {row['high']:+.4f}" if interval else "–"
        cells = [
            Cell(row["task_type"], classes="text"), Cell("", value=row["difference"], line=drawn),
            Cell(f"{row['difference']:+.4f}"), Cell(between), Cell(verdict(row), classes="text", told=row["verdict"]),
        ]  # fmt: skip
        table.rows.append(Row(row["model"], cells))
    return {"table": table, "notes": found.comparison.notes}


# --- the rest ---------------------------------------------------------------------------------------------------------


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
        "Share of each layer",
        ["layer", *read],
        caption="Share of each layer in what the trained pool adds up, its weight times the length of what it "
        "carries; blue is more than an even share, orange less. Last, how near the embedding is to that of plain "
        "pooling of the last layer: 1 where the pool changes nothing of it. "
        f"Over {texts} texts, mean over heads and seeds.",
    )
    for layer in layers:  # a row each: a page is as long as it likes, and only so wide
        cells = []
        for label, (shares, _) in read.items():
            cell = _colored(off[label].get(layer, 0), 0.5 / largest)
            cell.text = f"{shares[layer]:.3f}" if layer in shares else "not read"
            cells.append(cell)
        table.rows.append(Row(str(layer), cells))
    cosines = [Cell("–" if cosine is None else f"{cosine:.4f}") for _, cosine in read.values()]
    table.rows.append(Row("cosine with plain pooling", cosines))
    return table


def _costs(found: Found) -> Table:
    first = next(iter(found.notes.values()))[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}"
    return Table.plain(
        "Cost",
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
    return {
        "chosen": Table.plain("Recipe", lines, caption, "text"),
        "tried": Table.plain("Recipes tried", tried, "Mean over tasks.", "text"),
    }


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
