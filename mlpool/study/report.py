"""The report of a study: one HTML file that needs nothing else, and the same tables in Markdown."""

from __future__ import annotations

import base64
import datetime
import html
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from ..evaluation import results
from ..evaluation.compare import Comparison, compare
from .config import UNTRAINED, Entry, Study
from .runs import collect, finished

_PACKAGES = ("mlpool", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy", "scipy")
_COMPARISON, _COSINE = "comparison", "cosine_with_plain_pooling"
_PALE = 0.02  # differences in score up to here are never in full colour
_MARKS = {"higher": "▲", "lower": "▼"}
Notes = dict[str, list[dict[str, Any]]]  # label → what its finished trainings noted


@dataclass
class Found:
    """All that a report is made of. scores: label → task → score of each seed."""

    study: Study
    scores: dict[str, dict[str, list[float]]]
    tasks: list[str]
    notes: Notes
    comparison: Comparison | None
    recipes: dict[str, Any] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """Those with results."""
        return [entry for entry in self.study.entries if entry.label in self.scores]

    def means(self, label: str) -> list[float]:
        """Of each seed, over the tasks."""
        return [fmean(values) for values in zip(*self.scores[label].values(), strict=True)]

    def verdicts(self) -> dict[tuple[str, str], str]:
        """What is shown of a design on a task, after Holm: "higher" or "lower"."""
        rows = self.comparison.datasets if self.comparison else []
        words = {(row["model"], row["task"]): row["verdict"].split(" ")[0] for row in rows}
        return {key: word for key, word in words.items() if word in ("higher", "lower")}


def gather(study: Study, recipes: dict[str, dict[str, Any]], matched: Sequence[str] = ()) -> Found:
    """Read the finished runs and compare them.

    Raises:
        ValueError: there is nothing to report, or nothing of the baseline.
    """
    runs = study.runs(recipes)
    rows = collect(study.output, runs)
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        scores.setdefault(row.model, {}).setdefault(row.task, []).append(row.score)
    trained = [row for row in rows if row.model in {entry.label for entry in study.entries}]
    if study.baseline not in scores:
        raise ValueError(f"{study.output} holds no finished run of the baseline {study.baseline}: run the study first")
    notes: Notes = {}
    for run in runs:
        if run.kind == "seed" and (note := finished(study.output, run)):
            notes.setdefault(run.label, []).append(note)
    several = len({row.model for row in trained}) > 1
    comparison = compare(trained, study.baseline) if several else None
    path = study.output / "recipe.json"
    searched = json.loads(path.read_text()) if study.search and path.is_file() else {}
    tasks = list(dict.fromkeys(row.task for row in trained))
    return Found(study, scores, tasks, notes, comparison, searched, list(matched))


def write(found: Found, command: str) -> list[Path]:
    """Write report.html, summary.md and the comparison's files into the output folder; returns their paths."""
    output = found.study.output
    paths = [output / "report.html", output / "summary.md"]
    forest = None
    if found.comparison:
        paths += found.comparison.save(output / _COMPARISON)
        forest = output / _COMPARISON / "forest.png"
    paths[0].write_text(_page(found, command, forest), encoding="utf8")
    paths[1].write_text(summary(found), encoding="utf8")
    return paths


def summary(found: Found) -> str:
    """The tables of scores and costs in Markdown."""
    parts = []
    for header, *body in (score_table(found), cost_table(found)):
        lines = [f"| {' | '.join(line)} |" for line in (header, *body)]
        parts.append("\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]]))
    return "\n\n".join([headline(found), *parts]) + "\n"


# --- what is said -----------------------------------------------------------------------------------------------------


def headline(found: Found) -> str:
    """The result in a few sentences: the best mean, and what is shown."""
    baseline = found.study.baseline
    best = max(found.entries, key=lambda entry: fmean(found.means(entry.label))).label
    top, base = fmean(found.means(best)), fmean(found.means(baseline))
    said = f"Highest mean score: {best}, {_spread(found.means(best))}"
    said += "." if best == baseline else f"; the baseline {baseline} has {_spread(found.means(baseline))}."
    if best != baseline:
        said += f" The difference is {top - base:+.4f}."
    if not found.comparison:
        return said
    shown: dict[tuple[Any, ...], list[str]] = {}
    for row in found.comparison.table:
        if row["verdict"].startswith(("higher", "lower")):
            shown.setdefault((row["n"], row["task_type"], row["verdict"]), []).append(row["model"])
    for (n, kind, verdict), models in shown.items():
        said += f" Over {n} {kind} data sets shown to be {verdict}: {', '.join(models)}."
    if not shown:
        counts = {row["task_type"]: row["n"] for row in found.comparison.table}
        listed = ", ".join(f"{n} of {kind}" for kind, n in counts.items())
        said += f" Over data sets ({listed}) no difference to the baseline is shown."
    words = list(found.verdicts().values())
    tested = sum(row["p"] is not None for row in found.comparison.datasets)
    said += (
        f" Item by item, {words.count('higher')} of {tested} differences to it are shown to be higher and "
        f"{words.count('lower')} lower, each on its data set alone."
    )
    return said


def score_table(found: Found) -> list[list[str]]:
    """Header and lines: mean ± sd over seeds; the best of a column is bold, ▲ ▼ is shown after Holm."""
    lines = [["design", "mean", *found.tasks]]
    verdicts = found.verdicts()
    rows = [[found.means(e.label), *(found.scores[e.label][task] for task in found.tasks)] for e in found.entries]
    best = [max(fmean(row[i]) for row in rows) for i in range(len(rows[0]))]
    for entry, row in zip(found.entries, rows, strict=True):
        cells = []
        for i, values in enumerate(row):
            cell = _spread(values)
            cell = f"**{cell}**" if fmean(values) == best[i] else cell
            word = verdicts.get((entry.label, found.tasks[i - 1])) if i else None
            cells.append(cell + (f" {_MARKS[word]}" if word else ""))
        lines.append([entry.label + _is_baseline(found, entry), *cells])
    for entry in found.entries:
        label = UNTRAINED.format(entry.label)
        if label in found.scores:
            cells = [_spread(found.means(label)), *(_spread(found.scores[label][task]) for task in found.tasks)]
            lines.append([label, *cells])
    return lines


def cost_table(found: Found) -> list[list[str]]:
    """Header and lines, means over seeds."""
    lines = [["design", "trainable", "of it pool", "LoRA", "total", "training s", "texts/s", "peak memory MiB"]]
    for entry in found.entries:
        if notes := found.notes.get(entry.label):
            count = notes[0]["parameters"]
            lines.append([
                entry.label, *(f"{count[name] / 1e6:.2f} M" for name in ("trainable", "pool", "lora", "total")),
                _training_seconds(notes),
                f"{fmean(note['texts_per_second'] for note in notes):.0f}", _memory(notes),
            ])  # fmt: skip
    return lines


def profiles(found: Found) -> dict[str, tuple[dict[int, float], float | None]]:
    """Of each pool that reads several layers, mean over seeds: the share of each layer it reads, and the cosine of its
    embeddings with those of plain pooling (None where it does not start from them)."""
    read = {}
    for entry in found.entries:
        profiles = [note["profile"] for note in found.notes.get(entry.label, []) if note.get("profile")]
        if profiles:
            shares = [fmean(values) for values in zip(*(p["shares"] for p in profiles), strict=True)]
            cosines = [p["gate"][_COSINE] for p in profiles if _COSINE in p["gate"]]
            layers = dict(zip(profiles[0]["layers"], shares, strict=True))
            read[entry.label] = layers, fmean(cosines) if cosines else None
    return read


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _training_seconds(notes: Sequence[dict[str, Any]]) -> str:
    """Of the trainings that ran in one go: what was before a kill is not in a resumed one's time."""
    whole = [note["train_seconds"] for note in notes if not note.get("resumed")]
    return f"{fmean(whole):.0f}" if whole else "?"


def _memory(notes: Sequence[dict[str, Any]]) -> str:
    """Peak of the training: on CUDA the tensors', else the process's above what the libraries take."""
    peaks = []
    for note in notes:
        start, peak = note["memory"]["start"], note["memory"]["training"]
        if peak["cuda"] is not None:
            peaks.append(peak["cuda"])
        elif peak["resident"] is not None:
            peaks.append(peak["resident"] - start["resident"])
    return f"{fmean(peaks) / 2**20:.0f}" if peaks else "?"


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--page:#fff;--card:#f6f8fa;--link:#0550ae;
--up:0,114,178;--down:213,94,0}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9aa4af;--line:#3d444d;--page:#0d1117;--card:#161b22;
--link:#79b8ff;--up:64,156,255;--down:255,138,61}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2.5rem) 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:.4rem 0 .6rem;text-wrap:balance}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--line)}
p{max-width:68ch;margin:.5rem 0}.lead{font-size:1.06rem}.soft,figcaption{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:8px;background:var(--page)}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
figcaption{max-width:80ch;margin:.4rem 0}
th,td{padding:.38rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{background:var(--card);font-weight:600;vertical-align:bottom}
tbody th{text-align:left;font-weight:500;position:sticky;left:0;background:var(--page);z-index:1}
thead th:first-child{text-align:left;position:sticky;left:0;z-index:2}
tbody tr:last-child>*{border-bottom:0}
td.text{text-align:left;white-space:normal}
.sd{color:var(--soft);font-size:.85em}.best{font-weight:700}
.up{background:rgba(var(--up),var(--a))}.down{background:rgba(var(--down),var(--a))}
figure{margin:.6rem 0}.image{width:fit-content;max-width:100%}
img{display:block;min-width:720px;width:1000px;max-width:100%;background:#fff}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;
font-size:.85rem}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace}
details{margin:.7rem 0}summary{cursor:pointer;color:var(--link)}
li{max-width:75ch;margin:.25rem 0}dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media(max-width:40rem){tbody th,thead th:first-child{white-space:normal;min-width:8.5rem;max-width:9.5rem}
th,td{padding:.34rem .5rem}td.text{min-width:11rem}dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
@media print{.wide{overflow:visible}}
"""


def _page(found: Found, command: str, forest: Path | None) -> str:
    study = found.study
    done, planned = sum(map(len, found.notes.values())), len(study.entries) * len(study.seeds)
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    trained = f"{len(study.entries)} designs, {seeds}" + (
        "" if done == planned else f" ({done} of {planned} trainings finished)"
    )
    title = html.escape(study.title)
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{html.escape(headline(found))}</p>',
        f'<p class="soft">{trained}, on <code>{html.escape(study.base)}</code>; the same data, budget and seeds for '
        "all. Mean ± standard deviation over seeds; 1 is the best score.</p>",
        "<h2>Scores</h2>", _scores(found),
        *_forest(found, forest), *_profiles(found),
        "<h2>Cost</h2>", _costs(found),
        *_search(found), "<h2>How it was made</h2>", _provenance(found, command),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _scores(found: Found) -> str:
    trained = [(entry.label, entry.label + _is_baseline(found, entry)) for entry in found.entries]
    before = [(UNTRAINED.format(e.label), e.label) for e in found.entries if UNTRAINED.format(e.label) in found.scores]
    table = _score_table(
        found, trained,
        "Best of a column in bold. Blue is above the baseline, orange below, deeper for larger differences. ▲ ▼: shown "
        "to be higher or lower on this data set by a paired randomisation test over its items, after Holm's correction "
        "over all of them; it speaks of these trained models and this data set alone.",
    )  # fmt: skip
    if not before:
        return table
    untrained = _score_table(found, before, "The same before training, coloured against the trained baseline.")
    return f"{table}<details><summary>Before training</summary>{untrained}</details>"


def _is_baseline(found: Found, entry: Entry) -> str:
    return " (baseline)" if entry.label == found.study.baseline else ""


def _score_table(found: Found, lines: Sequence[tuple[str, str]], caption: str) -> str:
    """A line per (label, shown name), coloured by the difference to the baseline."""
    verdicts = found.verdicts()
    columns: dict[str, Any] = {"mean": found.means, **{task: _scores_on(found, task) for task in found.tasks}}
    level = {name: fmean(of(found.study.baseline)) for name, of in columns.items()}
    best = {name: max(fmean(of(label)) for label, _ in lines) for name, of in columns.items()}
    largest = max(abs(fmean(of(label)) - level[name]) for name, of in columns.items() for label, _ in lines)
    largest = max(largest, _PALE)
    rows = []
    for label, shown in lines:
        cells = [f'<th scope="row">{html.escape(shown)}</th>']
        for name, of in columns.items():
            mean = fmean(of(label))
            difference = mean - level[name]
            kind = "up" if difference > 0 else "down" if difference else ""
            shade = f' style="--a:{0.42 * abs(difference) / largest:.2f}"' if difference else ""
            word = verdicts.get((label, name))
            mark = f' {_MARKS[word]}<span class="hidden"> shown to be {word}</span>' if word else ""
            top = " best" if mean == best[name] else ""
            cells.append(f'<td class="{kind}{top}"{shade}>{_number(of(label))}{mark}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(["design", *columns], rows, caption)


def _scores_on(found: Found, task: str) -> Any:
    return lambda label: found.scores[label][task]


def _number(values: Sequence[float]) -> str:
    spread = f' <span class="sd">± {stdev(values):.4f}</span>' if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def _table(header: Sequence[str], rows: Iterable[str], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    said = html.escape(caption)
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="{said}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div><figcaption>{said}</figcaption></figure>"
    )


def _plain(lines: Sequence[Sequence[str]], caption: str, text: bool = False) -> str:
    """A table of a header and lines; text: of words, not of numbers."""
    kind = ' class="text"' if text else ""
    rows = (
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td{kind}>{html.escape(c)}</td>" for c in cells)}</tr>'
        for name, *cells in lines[1:]
    )
    return _table(lines[0], rows, caption)


def _forest(found: Found, path: Path | None) -> list[str]:
    if not found.comparison or path is None:
        return []
    data = base64.b64encode(path.read_bytes()).decode()
    rows = found.comparison.table
    alt = "; ".join(f"{r['model']}, {r['task_type']}: {r['difference']:+.4f}, {r['verdict']}" for r in rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in found.comparison.notes)
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    said = "A data set is the unit: with few of them little can be shown, and the plot says where that is so."
    return [
        "<h2>Differences to the baseline, by task type</h2>",
        f'<figure><div class="wide image" tabindex="0">{image}</div><figcaption>{said}</figcaption></figure>',
        f"<details><summary>How to read it</summary><ul>{notes}</ul></details>",
    ]


def _profiles(found: Found) -> list[str]:
    read = profiles(found)
    if not read:
        return []
    layers = sorted({layer for shares, _ in read.values() for layer in shares})
    # Against even reading; what is within a half of it is pale.
    off = {
        label: {layer: share * len(shares) - 1 for layer, share in shares.items()}
        for label, (shares, _) in read.items()
    }
    largest = max(0.5, *(abs(value) for row in off.values() for value in row.values()))
    rows = []
    for label, (shares, cosine) in read.items():
        cells = [f'<th scope="row">{html.escape(label)}</th>']
        for layer in layers:
            value = off[label].get(layer, 0)
            shade = f' class="{"up" if value > 0 else "down"}" style="--a:{0.5 * abs(value) / largest:.2f}"'
            cells.append(f"<td{shade}>{shares[layer]:.3f}</td>" if layer in shares else "<td>not read</td>")
        cells.append("<td>–</td>" if cosine is None else f"<td>{cosine:.4f}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    texts = next(n["profile"]["texts"] for notes in found.notes.values() for n in notes if n.get("profile"))
    return [
        "<h2>Which layers a pool reads</h2>",
        _table(
            ["design", *(f"layer {layer}" for layer in layers), "cosine with plain pooling"], rows,
            "Share of each layer in what the trained pool adds up, its weight times the length of what it carries; "
            "blue is more than an even share, orange less. Last, how near the embedding is to that of plain pooling, "
            "which a residual pool starts from: 1 where the pool changes nothing. "
            f"Over {texts} texts, mean over heads and seeds.",
        ),
    ]  # fmt: skip


def _costs(found: Found) -> str:
    first = next(iter(found.notes.values()))[0]
    where = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}"
    return _plain(
        cost_table(found),
        f"Mean over seeds, on {where}. Training without loading and saving where the trainer noted it; texts/s of "
        "encoding the evaluated texts; peak memory of training above what the process took before it (CUDA: tensors).",
    )


def _search(found: Found) -> list[str]:
    if not found.recipes and not found.matched:
        return []
    parts = ["<h2>Recipe</h2>"]
    if found.recipes:
        lines = [["for", "chosen", "score on dev", "searched with"]]
        tried = [["for", "recipe", "score on dev"]]
        for group, one in found.recipes.items():
            lines.append([group, _recipe(one["recipe"]), f"{one['score']:.4f}", ", ".join(one["searched_with"])])
            tried += [[group, _recipe(t["recipe"]), f"{t['score']:.4f}"] for t in one["tried"]]
        search = found.study.search
        steps = f"{search['max_steps']} steps" if search.get("max_steps") else "as many steps"
        parts += [
            _plain(lines, f"Chosen on development data alone ({', '.join(search['tasks'] or ['all'])}, split "
                   f"{search['split']}), by trainings of {steps} with seed {found.study.seeds[0]}.", text=True),
            f"<details><summary>All that was tried</summary>{_plain(tried, 'Mean over tasks.', text=True)}</details>",
        ]  # fmt: skip
    if found.matched:
        matched = "".join(f"<li>{html.escape(line)}</li>" for line in found.matched)
        parts.append(f"<p>Matched in size, so that capacity is no explanation:</p><ul>{matched}</ul>")
    return parts


def _recipe(recipe: dict[str, Any]) -> str:
    listed = (f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in recipe.items())
    return ", ".join(listed) or "as in the config"


def _provenance(found: Found, command: str) -> str:
    inputs = dict(found.study.inputs)
    facts = {
        "base": f"{found.study.base} ({inputs.pop(found.study.base, 'of the Hub')})",
        "data": "; ".join(f"{name} ({digest})" for name, digest in inputs.items()),
        "versions": ", ".join(_versions()),
        "machine": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    config = html.escape(yaml.safe_dump(found.study.source, sort_keys=False, allow_unicode=True))
    again = f"mlpool study {found.study.output / 'study.yaml'}"
    return (
        f"<pre><code>{html.escape(command)}\n\n# the same again, elsewhere:\n{html.escape(again)} -o NEW_FOLDER</code>"
        f"</pre><dl>{listed}</dl><p>Every training's own config and log are in <code>runs/DESIGN/seed-N/</code>, all "
        f"scores in <code>{results.FILE_NAME}</code>, tests in <code>{_COMPARISON}/</code>.</p>"
        f"<details><summary>The config</summary><pre><code>{config}</code></pre></details>"
    )


def _versions() -> Iterable[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
