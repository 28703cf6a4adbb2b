"""The report of a study: what was found, as tables; written as one HTML file (page.py) and in Markdown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from ..evaluation.compare import compare
from ..evaluation.comparison import Comparison
from ..show import markdown
from .config import UNTRAINED, Entry, Study
from .runs import collect, finished

COMPARISON, _COSINE = "comparison", "cosine_with_plain_pooling"
MARKS = {"higher": "▲", "lower": "▼"}
Notes = dict[str, list[dict[str, Any]]]  # label → what its finished trainings noted


@dataclass
class Found:
    """All that a report is made of. scores: label → task → score of each of its seeds. groups: task type → tasks."""

    study: Study
    scores: dict[str, dict[str, list[float]]]
    seeds: dict[str, list[int | None]]
    groups: dict[str, list[str]]
    notes: Notes
    comparison: Comparison | None
    recipes: dict[str, Any] = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """Those with results."""
        return [entry for entry in self.study.entries if entry.label in self.scores]

    @property
    def tasks(self) -> list[str]:
        return [task for tasks in self.groups.values() for task in tasks]

    def metrics(self) -> dict[str, list[str]]:
        """What a design can be judged by: all tasks, those of a type, one alone; each is the mean over these tasks."""
        several = {f"mean of {kind}": tasks for kind, tasks in self.groups.items() if len(tasks) > 1}
        return {
            "mean": self.tasks,
            **(several if len(self.groups) > 1 else {}),
            **{task: [task] for task in self.tasks},
        }

    def means(self, label: str, tasks: Sequence[str] = ()) -> list[float]:
        """Of each seed, over these tasks, all by default."""
        values = (self.scores[label][task] for task in tasks or self.tasks)
        return [fmean(of_seed) for of_seed in zip(*values, strict=True)]

    def differences(self, label: str, tasks: Sequence[str]) -> list[float]:
        """`means` less the baseline's, of each seed that both have."""
        mine, theirs = (
            dict(zip(self.seeds[one], self.means(one, tasks), strict=True)) for one in (label, self.study.baseline)
        )
        return [score - theirs[seed] for seed, score in mine.items() if seed in theirs]

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
    seeds: dict[str, list[int | None]] = {}
    for row in rows:
        of_task = scores.setdefault(row.model, {}).setdefault(row.task, [])
        of_task.append(row.score)
        if len(of_task) > len(of_model := seeds.setdefault(row.model, [])):
            of_model.append(row.seed)
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
    groups: dict[str, list[str]] = {}
    for task, kind in {row.task: row.task_type for row in trained}.items():
        groups.setdefault(kind, []).append(task)
    return Found(study, scores, seeds, groups, notes, comparison, searched, list(matched))


def summary(found: Found) -> str:
    return "\n\n".join([headline(found), markdown(score_table(found)), markdown(cost_table(found))]) + "\n"


# --- what is said -----------------------------------------------------------------------------------------------------


def headline(found: Found) -> str:
    """The result in a few sentences: the best mean, and what is shown."""
    baseline = found.study.baseline
    best = max(found.entries, key=lambda entry: fmean(found.means(entry.label))).label
    top, base = fmean(found.means(best)), fmean(found.means(baseline))
    said = f"Highest mean score: {best}, {spread(found.means(best))}"
    said += "." if best == baseline else f"; the baseline {baseline} has {spread(found.means(baseline))}."
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
            cell = spread(values)
            cell = f"**{cell}**" if fmean(values) == best[i] else cell
            word = verdicts.get((entry.label, found.tasks[i - 1])) if i else None
            cells.append(cell + (f" {MARKS[word]}" if word else ""))
        lines.append([entry.label + is_baseline(found, entry), *cells])
    for entry in found.entries:
        label = UNTRAINED.format(entry.label)
        if label in found.scores:
            cells = [spread(found.means(label)), *(spread(found.scores[label][task]) for task in found.tasks)]
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


def spread(values: Sequence[float]) -> str:
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


def is_baseline(found: Found, entry: Entry) -> str:
    return " (baseline)" if entry.label == found.study.baseline else ""
