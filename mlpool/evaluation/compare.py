"""`mlpool compare A B [C …]`: what do scores of several models on the same data sets show, and what can they not show?

The first model is the baseline; each other one is compared with it, per task type. A data set is the unit: scores are
averaged over seeds first. Sources: Wilcoxon's test per task type as in arXiv 2409.02727 (there uncorrected); Holm,
rank-biserial effect sizes, intervals and tests over items are added (`statistics.py`).
"""

import argparse
import difflib
import statistics as plain
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..show import progress
from .comparison import Comparison, Row, number, reading
from .results import Items, Score, read, read_items

Runs = dict[str, list[Score]]  # task → one score per seed

# Order of the rows; other types follow by name.
TASK_TYPES = ("STS", "Retrieval", "Classification", "Clustering", "PairClassification", "Reranking", "Summarization")
# How far a score may be from what its per-item file gives: files and tables round.
ITEM_TOLERANCE = 1e-3


def compare(
    results: Iterable[str | Path | Score],
    baseline: str | None = None,
    *,
    alpha: float = 0.05,
    permutations: int = 9999,
    seed: int = 0,
    split: str | None = None,
) -> Comparison:
    """Compare models with a baseline on the data sets they share.

    Args:
        results: results folders, tidy CSV files (one with several models counts as several), or rows.
        baseline: label of the model to compare with; the first by default.
        alpha: level of the verdicts, after Holm.
        permutations: of each randomisation test; the least p it can reach is 1 / (permutations + 1).
        seed: of the randomisation tests; the same seed gives the same table.
        split: keep only rows of this split.

    Raises:
        FileNotFoundError, ValueError: what cannot be read (file and line); fewer than two models; an unknown baseline;
        nothing in common; one data set twice for a model and seed, or with two metrics, splits or task types.
    """
    if not 0 < alpha < 1 or permutations < 1:
        raise ValueError(
            f"alpha={alpha}, permutations={permutations}: expected 0 < alpha < 1 and 1 permutation or more"
        )
    models = _models(results, split)
    baseline = _baseline(models, baseline)
    table: list[Row] = []
    datasets: list[Row] = []
    notes: list[str] = []
    for model in models:
        if model != baseline:
            common = _common(model, models[model], baseline, models[baseline], notes)
            rows = [_dataset(model, baseline, models[model][task], models[baseline][task]) for task in common]
            datasets += rows
            table += [_task_type([row for row in rows if row["task_type"] == kind]) for kind in _types(rows)]
    _test_items(datasets, models, permutations, seed)
    for rows in (table, [row for row in datasets if row["p"] is not None]):
        _correct(rows, alpha)
    return Comparison(baseline, table, datasets, reading(table, datasets, alpha) + notes, alpha)


# --- what is compared -------------------------------------------------------------------------------------------------


def _models(results: Iterable[str | Path | Score], split: str | None) -> dict[str, Runs]:
    """Label → task → scores. A label that several inputs use gets the input's name."""
    given = [results] if isinstance(results, (str, Path, Score)) else list(results)
    loose = [row for row in given if isinstance(row, Score)]
    sources = [(str(path), read(path)) for path in given if not isinstance(path, Score)]
    sources += [("", loose)] if loose else []
    labels = [label for _, rows in sources for label in {row.model for row in rows}]
    models: dict[str, Runs] = {}
    for name, rows in sources:
        kept = [row for row in rows if split in (None, row.split)]
        if not kept:
            only = f" of split {split!r}, only {', '.join(sorted({repr(row.split) for row in rows}))}" if rows else ""
            raise ValueError(f"{name or 'the given rows'}: no rows{only}")
        for label in dict.fromkeys(row.model for row in kept):
            unique = label if labels.count(label) == 1 else f"{label} ({name})"
            if unique in models:
                raise ValueError(f"{name} is given twice: each model is compared once")
            models[unique] = _runs([row for row in kept if row.model == label])
    return models


def _runs(rows: list[Score]) -> Runs:
    """Task → scores, one per seed."""
    runs: Runs = {}
    for row in rows:
        for other in runs.setdefault(row.task, []):
            if _differ(row, other):
                raise ValueError(
                    f"{row.model} has {row.task} as {_what(other)} ({other.place}) and as {_what(row)} ({row.place}): "
                    "keep one, or choose with split="
                )
            if row.seed == other.seed:
                seed = "without a seed" if row.seed is None else f"with seed {row.seed}"
                raise ValueError(
                    f"{row.model} has {row.task} {seed} twice ({other.place}; {row.place}): identities "
                    f"{other.identity or 'none'} and {row.identity or 'none'}; remove one, or label it differently"
                )
        runs[row.task].append(row)
    return runs


def _differ(a: Score, b: Score) -> bool:
    """Not the same measurement, as far as both say."""
    pairs = (a.task_type, b.task_type), (a.split, b.split), (a.metric, b.metric)
    return any(x and y and x != y for x, y in pairs)


def _what(row: Score) -> str:
    return f"{row.task_type}, {row.metric or 'no metric named'}, split {row.split or 'not named'}"


def _baseline(models: dict[str, Runs], name: str | None) -> str:
    if len(models) < 2:
        raise ValueError(f"compare needs two models, found {', '.join(models) or 'none'}")
    if name is None:
        return next(iter(models))
    if name not in models:
        near = difflib.get_close_matches(name, models, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no results of the baseline {name!r}, there are {', '.join(map(repr, models))}{hint}")
    return name


def _common(model: str, mine: Runs, baseline: str, theirs: Runs, notes: list[str]) -> list[str]:
    """Tasks both have; what is left out goes to `notes`."""
    common = [task for task in theirs if task in mine]
    if not common:
        raise ValueError(
            f"{model} and {baseline} have no data set in common: {model} has {', '.join(sorted(mine))}; "
            f"{baseline} has {', '.join(sorted(theirs))}"
        )
    for name, only in ((model, sorted(set(mine) - set(theirs))), (baseline, sorted(set(theirs) - set(mine)))):
        if only:
            notes.append(f"{model} against {baseline}: left out, only {name} has them: {', '.join(only)}.")
    for task in common:
        a, b = mine[task][0], theirs[task][0]
        if _differ(a, b):
            raise ValueError(
                f"{task} is {_what(a)} for {model} ({a.place}) but {_what(b)} for {baseline} ({b.place}): "
                "not the same measurement"
            )
    return common


def _types(rows: list[Row]) -> list[str]:
    found = {row["task_type"] for row in rows}
    return [kind for kind in TASK_TYPES if kind in found] + sorted(found - set(TASK_TYPES))


# --- rows -------------------------------------------------------------------------------------------------------------


def _dataset(model: str, baseline: str, mine: list[Score], theirs: list[Score]) -> Row:
    a, b = [row.score for row in mine], [row.score for row in theirs]
    # Rounding errors of the means are no difference; + 0.0 turns -0.0 into 0.0.
    difference = round(plain.fmean(a) - plain.fmean(b), 12) + 0.0
    return {
        "model": model, "baseline": baseline, "task_type": mine[0].task_type, "task": mine[0].task,
        "metric": mine[0].metric, "baseline_score": plain.fmean(b), "model_score": plain.fmean(a),
        "difference": difference,
        "baseline_seeds": len(b), "model_seeds": len(a), "baseline_seed_sd": _sd(b), "model_seed_sd": _sd(a),
        "items": None, "p": None, "p_holm": None, "smallest_p": None, "smallest_p_holm": None, "permutations": None,
        "verdict": "",
    }  # fmt: skip


def _sd(values: list[float]) -> float | None:
    return plain.stdev(values) if len(values) > 1 else None


def _task_type(rows: list[Row]) -> Row:
    """Wilcoxon's test, effect and interval over the data sets of one task type."""
    from .statistics import mean_interval, signed_rank

    differences = [row["difference"] for row in rows]
    test, interval = signed_rank(differences), mean_interval(differences)
    low, high = interval or (None, None)
    means = {name: plain.fmean(row[name] for row in rows) for name in ("baseline_score", "model_score", "difference")}
    sds = {name: [row[name] for row in rows if row[name] is not None] for name in ("baseline_seed_sd", "model_seed_sd")}
    return {
        "model": rows[0]["model"], "baseline": rows[0]["baseline"], "task_type": rows[0]["task_type"], "n": len(rows),
        **means, "low": low, "high": high, "wins": test.wins, "losses": test.losses, "ties": test.zeros,
        "effect": test.effect, "p": test.p, "p_holm": None, "smallest_p": test.smallest_p, "smallest_p_holm": None,
        "method": test.method,
        **{name: _range([row[name] for row in rows]) for name in ("baseline_seeds", "model_seeds")},
        **{name: plain.fmean(values) if values else None for name, values in sds.items()},
        "verdict": "",
    }  # fmt: skip


def _range(counts: list[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _correct(rows: list[Row], alpha: float) -> None:
    """Holm over all rows, and what may be said of each."""
    from .statistics import holm, smallest_holm

    p_values, smallest = [row["p"] for row in rows], [row["smallest_p"] for row in rows]
    corrected = zip(rows, holm(p_values), smallest_holm(p_values, smallest), strict=True)
    for row, row["p_holm"], row["smallest_p_holm"] in corrected:
        row["verdict"] = _verdict(row, alpha)


def _verdict(row: Row, alpha: float) -> str:
    if row["smallest_p"] == 1 and row["difference"] == 0:  # one difference alone would not be zero
        return "no difference"
    if row["smallest_p_holm"] > alpha:
        after = "" if row["smallest_p"] > alpha else f" ({number(row['smallest_p_holm'])} after Holm)"
        drawn = row.get("permutations")
        what = "too few permutations" if drawn and row["smallest_p"] * (drawn + 1) < 1.5 else "n too small"
        return f"{what}: smallest reachable p = {number(row['smallest_p'])}{after}"
    if row["p_holm"] > alpha:
        return "no difference shown"
    side = row["effect"] if "effect" in row else row["difference"]  # the ranks were tested
    word = "higher" if side > 0 else "lower"
    return word if side * row["difference"] > 0 else f"{word} by ranks, though not in the mean"


# --- tests over items -------------------------------------------------------------------------------------------------


def _test_items(datasets: list[Row], models: dict[str, Runs], permutations: int, seed: int) -> None:
    """Fill in the randomisation test of every data set whose per-item results are there; say why of the others."""
    for row in progress("randomisation tests", "data set", shown=None, iterable=datasets, leave=False):
        mine, theirs = models[row["model"]][row["task"]], models[row["baseline"]][row["task"]]
        row["verdict"] = _test_dataset(row, mine, theirs, permutations, [seed, zlib.crc32(row["task"].encode())])


def _test_dataset(row: Row, mine: list[Score], theirs: list[Score], permutations: int, seed: list[int]) -> str:
    """Put the test into `row`; returns why there is none, or nothing."""
    import numpy as np

    from .statistics import randomise, spearman_differences

    for score in mine + theirs:
        if score.items_path is None:
            return f"not tested: no per-item results of {score.model}"
        if not score.items_path.is_file():
            return f"not tested: {score.items_path} does not exist"
    files = [read_items(score.items_path) for score in mine + theirs if score.items_path]
    if len({items.gold is None for items in files}) > 1:
        return "not tested: one model has values per item, the other predictions"
    for score, items in zip(mine + theirs, files, strict=True):
        what, metric = _metric(items)
        if abs(metric - score.score) > ITEM_TOLERANCE:
            return f"not tested: the {what} of its items is {metric:.4f}, {score.model}'s score {score.score:.4f}"
    shared = files[0].ids
    for items in files[1:]:
        shared = np.intersect1d(shared, items.ids)
    if len(shared) < 2:
        return f"not tested: {len(shared)} items in common"
    orders = [_order(items, shared) for items in files]
    values = np.stack([items.values[order] for items, order in zip(files, orders, strict=True)])
    a, b = np.split(values, [len(mine)])
    golds = [items.gold[order] for items, order in zip(files, orders, strict=True) if items.gold is not None]
    if any((gold != golds[0]).any() for gold in golds):
        raise ValueError(f"{mine[0].items_path} and {theirs[0].items_path} differ in gold: not the same data set")
    differences = spearman_differences(a, b, golds[0]) if golds else a.mean(0) - b.mean(0)
    test = randomise(differences, permutations, seed)
    row.update(items=test.n, p=test.p, smallest_p=test.smallest_p, permutations=test.permutations)
    return ""


def _metric(items: Items) -> tuple[str, float]:
    from .statistics import standard_ranks

    if items.gold is None:
        return "mean", float(items.values.mean())
    return "Spearman correlation", float(standard_ranks(items.values) @ standard_ranks(items.gold))


def _order(items: Items, ids: Any) -> Any:
    """Where these ids stand in the file."""
    import numpy as np

    order = np.argsort(items.ids)
    return order[np.searchsorted(items.ids, ids, sorter=order)]


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", help="results folder, or tidy CSV (several models: split)")
    add("--baseline", metavar="LABEL", help="model to compare with (default: the first)")
    add("--alpha", type=float, default=0.05, help="level of the verdicts, after Holm (default: %(default)s)")
    add("--split", help="keep only rows of this split")
    add("--permutations", type=int, default=9999, help="of each test over items (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the tests over items (default: %(default)s)")
    add("--datasets", action="store_true", help="print the table by data set too")
    add("-o", "--output", type=Path, metavar="DIR", help="write tables (Markdown, CSV) and a forest plot")


def run(args: argparse.Namespace) -> None:
    found = compare(
        args.results, args.baseline, alpha=args.alpha, permutations=args.permutations, seed=args.seed, split=args.split
    )
    if args.datasets:
        print(found.by_data_set(), end="\n\n")
    print(found)
    if args.output:
        print("wrote", *found.save(args.output), file=sys.stderr)
