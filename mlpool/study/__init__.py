"""`mlpool study`: the controlled comparison, end to end.

The same base, data, seeds and budget for every design: the recipe is searched on development data, each design is
trained with each seed and evaluated, and what the results show is compared, priced and put into one HTML report.

An output folder holds

    report.html, summary.md    the result
    results.csv, comparison/   all scores as `mlpool compare` reads them, and what it says
    study.yaml                 the config, overrides applied: `mlpool study study.yaml -o NEW` does the same again
    search/, recipe.json       the search for the recipe, and what it chose
    runs/DESIGN/seed-N/        one training and its evaluation each, see runs.py

Under torchrun or accelerate each process trains whole runs on a device of its own, and they meet in the files of the
output folder, which all must see; a single run is not spread over devices.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..files import write_json, write_text
from ..options import rank_and_world

if TYPE_CHECKING:
    from .config import Study, read_study

__all__ = ["Study", "add_arguments", "choose", "read_study", "run", "study"]


def __getattr__(name: str) -> Any:
    if name not in ("Study", "read_study"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import config  # imports what trains, seconds that `mlpool study --help` need not wait

    return getattr(config, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="a YAML file; configs/study/ has ready ones")
    add("--base", metavar="MODEL", help="base model, a folder or Hub name (instead of the config's)")
    add("--data", metavar="DIR", help="folder of data: training files and what is evaluated (instead of data_dir)")
    add("--made-data", action="store_true", help="no data? make a small set in the output, to see that all runs")
    add("-o", "--output", metavar="DIR", help="folder to write (instead of the config's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, say train.max_steps=50")
    add("--jobs", type=int, default=1, help="runs at a time on this machine (default 1)")
    add("--dry-run", action="store_true", help="print the plan with its estimated cost and stop")
    add("--no-estimate", action="store_true", help="do not time a step of each design first")
    add("--report", action="store_true", help="train nothing: report on what is finished")
    add("--force", action="store_true", help="where the output holds a study of another config, start in a new folder")


def run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():  # before seconds of imports
        raise FileNotFoundError(f"no config {args.config}; configs/study/ has ready ones")
    from .config import read_study

    given = {"base": args.base, "data_dir": args.data, "output": args.output}
    config = read_study(args.config, args.set, made_data=args.made_data, **given)
    study(
        config, jobs=args.jobs, dry_run=args.dry_run, estimate=not args.no_estimate, report_only=args.report,
        force=args.force, command=shlex.join(["mlpool", *sys.argv[1:]]),
    )  # fmt: skip


def study(
    config: "Study | str | Path | Mapping[str, Any]",
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    dry_run: bool = False,
    estimate: bool = True,
    report_only: bool = False,
    force: bool = False,
    command: str = "",
) -> Path:
    """Run a study, or go on with one; returns its output folder.

    Args:
        config: a YAML file, its content, or what `read_study` returns. overrides: "train.max_steps=50".
        jobs: runs at a time, each in a process of its own. Under torchrun each process takes its share of the runs.
        dry_run: print the plan and stop. estimate: time a step of each design for it.
        report_only: train nothing, report on what is finished.
        force: where the output holds runs of another config, use the next free folder beside it.
        command: how it was called, for the report.

    Raises:
        ValueError: a wrong config, or one that differs from what is in the output already (what changed is said).
        RuntimeError: some runs failed, named; all others are done, and a new start goes on with the failed ones.
    """
    import yaml

    from . import runs as work
    from .config import Study, read_study
    from .parameters import match_parameters
    from .plan import plan

    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    config = config if isinstance(config, Study) else read_study(config, overrides)
    first = rank_and_world()[0] == 0
    if force:
        config.output = _free_folder(config.output)
    matched = match_parameters(config)
    work.check_unchanged(config.output, config.search_runs() if config.search else config.runs())
    if first and not report_only:
        print("\n".join([plan(config, jobs, estimate), *(f"matched   {line}" for line in matched)]), flush=True)
    if dry_run:
        return config.output
    if first:
        write_text(config.output / "study.yaml", yaml.safe_dump(config.source, sort_keys=False, allow_unicode=True))
    recipes: dict[str, dict[str, Any]] = {}
    if config.search:
        if not report_only:
            work.run_all(config.search_runs(), config.output, jobs, False, "search")
        recipes = choose(config)
    if not report_only:
        work.run_all(config.runs(recipes), config.output, jobs, config.keep_models, "study")
    if first:
        from . import page, report

        found = report.gather(config, recipes, matched)
        paths = page.write(found, command or f"mlpool study {config.output / 'study.yaml'}")
        print(f"\n{report.summary(found)}\n{paths[0]}")
    return config.output


def choose(config: "Study") -> dict[str, dict[str, Any]]:
    """The best recipe of each group by its mean score on the development data, the first of equals.

    A recipe's score is the mean over the entries it was searched with and over the tasks. Writes recipe.json.

    Raises:
        ValueError: the search is not finished.
    """
    from ..evaluation import results
    from .config import fitting
    from .runs import finished

    if missing := [run for run in config.search_runs() if not finished(config.output, run)]:
        raise ValueError(
            f"the search in {config.output} is not finished: {len(missing)} runs are missing; run the study"
        )

    def score(entry: Any, candidate: dict[str, Any]) -> float:
        rows = results.read(config.output / config.search_run(entry, candidate).folder / "evaluation")
        return fmean(row.score for row in rows)

    found = {}
    for group, members in config.searched().items():
        tried: list[dict[str, Any]] = []
        for candidate in config.candidates:
            recipe = fitting(candidate, *members)
            if all(recipe != one["recipe"] for one in tried):
                tried.append({"score": fmean(score(entry, recipe) for entry in members), "recipe": recipe})
        best = max(tried, key=lambda one: one["score"])
        labels = [entry.label for entry in members]
        found[group] = {"recipe": best["recipe"], "score": best["score"], "searched_with": labels, "tried": tried}
    if rank_and_world()[0] == 0:
        write_json(config.output / "recipe.json", found, 1)
    return {group: one["recipe"] for group, one in found.items()}


def _free_folder(output: Path) -> Path:
    """The folder, or the first of OUTPUT-2, OUTPUT-3, ... that is not there.

    Raises:
        ValueError: with several processes, which could not agree on one.
    """
    if rank_and_world()[1] > 1:
        raise ValueError("--force cannot be used with several processes, which must agree on a folder: give --output")
    places = (output.with_name(f"{output.name}-{n}" if n > 1 else output.name) for n in count(1))
    return next(place for place in places if not place.exists())
