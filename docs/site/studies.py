"""The scores of studies: benchmarks/results/designs.csv, and the tables that docs/designs.md makes of it.

    python docs/site/studies.py study/smollm2 smollm2     # a study's folder, the name of its base; then make plots

A row of a table is a design with what is special about it, as the study's own files say: pool, layers, learning rate.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SCORES = ROOT / "benchmarks" / "results" / "designs.csv"
COSTS = ROOT / "benchmarks" / "results" / "costs-cpu-1core.csv"
COLUMNS = ("base", "row", "seed", "task", "metric", "items", "score", "date")
LATENTS = 16  # of a default pool
Line = dict[str, str]

SIX = {
    "STS-B": ("sts/stsb",), "STS16": ("sts/sts16",), "SICK-R": ("sts/sickr",), "MedQuAD": ("retrieval/medquad",),
    "SciTLDR": ("retrieval/scitldr",), "SQuAD": ("retrieval/squad_sentences",),
}  # fmt: skip
FOUR = {name: tasks for name, tasks in SIX.items() if name not in ("SciTLDR", "SQuAD")}
KINDS = {
    "STS, 7 sets": tuple(f"sts/{name}" for name in ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr")),
    "retrieval, 3": tuple(f"retrieval/{name}" for name in ("medquad", "scitldr", "squad_sentences")),
    "classification, 3": tuple(
        f"classification/{name}" for name in ("banking77", "amazon_counterfactual_en", "mr_polarity")
    ),
    "clustering, 1": ("clustering/banking77",),
}


class Table(NamedTuple):
    """columns: name → the tasks that it is the mean of. rows: as they are named → as they are shown.

    costs: the design against which they stand, if they do.
    """

    base: str
    columns: Mapping[str, Sequence[str]]
    rows: Mapping[str, str]
    costs: str = ""


# --- from a study's folder --------------------------------------------------------------------------------------------


def named(train: Mapping[str, Any], pool: Mapping[str, Any], raw: bool) -> str:
    """The row of a run. train, pool: its configs. raw: the base is a language model as it was pretrained."""
    said = [train["design"]]
    if "num_latents" in pool:
        if pool["num_latents"] != LATENTS:
            said.append(f"{pool['num_latents']} latents")
        if pool["residual"] is False:
            said.append("released")
        elif raw and "start" in pool and not pool.get("whiten"):  # not a pool of the last layer
            said.append(f"not whitened, from {'the last layer' if pool['start'] == 'last' else 'all layers'}")
    if train.get("layers"):
        said.append(f"layers {', '.join(map(str, train['layers']))}")
    if train.get("depth"):
        said.append(f"{train['depth']} layers kept")
    if raw and not train.get("lora"):
        said.append("all weights")
    return f"{', '.join(said)} at {train['learning_rate']:g}"


def lines_of(study: Path, base: str, raw: bool) -> list[Line]:
    """Every score of a study's trained designs on test data."""
    found = []
    for config in sorted(study.glob("runs/*/seed-*/config.json")):
        folder = config.parent
        if not (folder / "run.json").is_file():
            continue
        train = json.loads(config.read_text())["train"]
        pooler = folder / "model" / "1_Pooler" / "config.json"
        pool = json.loads(pooler.read_text()) if pooler.is_file() else {}
        row = named(train, pool, raw)
        for one in read(folder / "evaluation" / "results.csv"):
            if one["split"] == "test":
                found.append(
                    dict(zip(COLUMNS, (base, row, one["seed"], one["task"], one["metric"], one["n_items"],
                                       f"{float(one['score']):.5f}", one["date"][:10]), strict=True))
                )  # fmt: skip
    return found


def add(study: Path, base: str, raw: bool = True, path: Path = SCORES) -> int:
    """Bring a study's scores in; those of the same base, row, seed and task are replaced. Returns how many."""
    new = lines_of(study, base, raw)
    if not new:
        raise SystemExit(f"{study} holds no finished run: give the output folder of a study")
    kept = {_key(line): line for line in [*(read(path) if path.is_file() else []), *new]}
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept))
    return len(new)


def _key(line: Line) -> tuple[str, ...]:
    return tuple(line[name] for name in ("base", "row", "seed", "task"))


def read(path: Path) -> list[Line]:
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


# --- to a table -------------------------------------------------------------------------------------------------------


def scores(shown: Table, row: str, lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Seed → task → score, of the seeds that have all tasks of the table."""
    tasks = {task for of in shown.columns.values() for task in of}
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        if (line["base"], line["row"]) == (shown.base, row) and line["task"] in tasks:
            found.setdefault(line["seed"], {})[line["task"]] = float(line["score"])
    return {seed: of for seed, of in sorted(found.items()) if of.keys() == tasks}


def means(shown: Table, row: str, lines: Sequence[Line]) -> list[float]:
    """Of each column the mean over its tasks and the seeds; last, that of all tasks.

    Raises:
        LookupError: no seed has all the tasks.
    """
    found = scores(shown, row, lines).values()
    if not found:
        raise LookupError(f"{SCORES.name} has no {row!r} of {shown.base} with all of {', '.join(shown.columns)}")
    columns = [mean(of[task] for of in found for task in tasks) for tasks in shown.columns.values()]
    return [*columns, mean(score for of in found for score in of.values())]


def rate(row: str) -> str:
    """Its learning rate, as 1e-3."""
    return f"{float(row.rpartition(' at ')[2]):.0e}".replace("e-0", "e-")


def costs(shown: Table, row: str, path: Path = COSTS) -> list[str]:
    """Texts a second of a row's design, encoding and training, over those of the table's baseline."""
    found = {line["design"]: line for line in read(path) if line["base"] == shown.base}
    ours, base = found[row.rpartition(" at ")[0]], found[shown.costs]
    return [f"{float(ours[key]) / float(base[key]):.2f}" for key in ("encode_texts_per_s", "train_texts_per_s")]


def table(shown: Table, lines: Sequence[Line]) -> str:
    """As Markdown, the best of each column bold."""
    body = {row: means(shown, row, lines) for row in shown.rows}
    best = [max(round(value, 3) for value in column) for column in zip(*body.values(), strict=True)]
    count = sum(map(len, shown.columns.values()))
    timed = ["encode", "train"] if shown.costs else []
    header = ["design", "rate", *shown.columns, f"mean of {count}", "by seed", *timed]
    text = [header, ["---"] * len(header)]
    for row, found in body.items():
        marked = [f"**{v:.3f}**" if round(v, 3) == top else f"{v:.3f}" for v, top in zip(found, best, strict=True)]
        seeds = [f"{mean(of.values()):.3f}" for of in scores(shown, row, lines).values()]
        cost = costs(shown, row) if shown.costs else []
        text.append([shown.rows[row], rate(row), *marked, ", ".join(seeds), *cost])
    return "\n".join(f"| {' | '.join(row)} |" for row in text) + "\n"


MULTI = "multi-layer-causal-mean"
WHOLE = {  # every design, at one rate
    "multi-layer-causal-mean at 0.001": "multi-layer-causal-mean",
    "multi-layer-bidirectional at 0.001": "multi-layer-bidirectional",
    "mean-causal at 0.001": "mean-causal",
    "mean-bidirectional at 0.001": "mean-bidirectional",
    "multi-layer-causal at 0.001": "multi-layer-causal",
    "layer-weights-bidirectional at 0.001": "layer-weights-bidirectional",
    "last-layer-bidirectional at 0.001": "last-layer-bidirectional",
    "last-layer-causal at 0.001": "last-layer-causal",
    "eos-causal at 0.001": "eos-causal",
    "multi-layer-causal-mean, released at 0.001": "multi-layer-causal-mean, released equations",
}
TABLES = {
    "designs": Table("smollm2", KINDS, WHOLE, costs="mean-causal"),
    "pools": Table("smollm2", SIX, {
        "mean-causal at 0.003": "mean-causal",
        f"{MULTI} at 0.003": MULTI,
        f"{MULTI}, 64 latents at 0.003": "64 latents",
        f"{MULTI}, 64 latents, not whitened, from all layers at 0.003": "64, not whitened",
        f"{MULTI}, 64 latents, released at 0.003": "64, released equations",
        "mean-causal at 0.001": "mean-causal",
        f"{MULTI} at 0.001": MULTI,
        f"{MULTI}, 32 latents at 0.001": "32 latents",
        f"{MULTI}, 64 latents at 0.001": "64 latents",
        f"{MULTI}, 64 latents, 18 layers kept at 0.001": "64, 18 of 30 layers",
        f"{MULTI}, 64 latents, layers 29 at 0.001": "64, the last layer alone, whitened",
        f"{MULTI}, 64 latents, not whitened, from all layers at 0.001": "64, not whitened",
        f"{MULTI}, 64 latents, released at 0.001": "64, released equations",
        f"{MULTI}, all weights at 2e-05": "all weights, no LoRA",
        f"{MULTI}, all weights at 0.0001": "all weights, no LoRA",
    }),
    "gemma": Table("gemma3", SIX, {
        "mean-causal at 0.001": "mean-causal",
        f"{MULTI}, 64 latents at 0.001": f"{MULTI}, 64 latents",
        f"{MULTI} at 0.003": MULTI,
    }),
    "minilm": Table("minilm", FOUR, {
        "mean-bidirectional at 2e-05": "mean-bidirectional",
        "multi-layer-bidirectional at 2e-05": "multi-layer-bidirectional",
        "multi-layer-bidirectional, 64 latents at 2e-05": "multi-layer-bidirectional, 64 latents",
    }),
}  # fmt: skip


def made(name: str) -> str:
    return table(TABLES[name], read(SCORES))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the output folder of `mlpool study`")
    parser.add_argument("base", help="what the tables call its base")
    parser.add_argument("--encoder", action="store_true", help="the base is no language model as it was pretrained")
    args = parser.parse_args()
    print(f"{add(args.study, args.base, raw=not args.encoder)} scores in {SCORES.relative_to(ROOT)}")
