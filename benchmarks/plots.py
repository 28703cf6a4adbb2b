"""Plots of the benchmarks' rows, for summary.py. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from measure import Row, number

matplotlib.use("Agg")
from matplotlib import pyplot

TRAINED = ("eager", "eager cached", "sentence-transformers", "mlpool", "mlpool cached")


def bars(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of speed-up over eager and of extra memory, one group per case.

    Rows need: case, provider, ratio_eager, extra_mib.
    """
    cases, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "provider"))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.18 * len(rows)), sharey=True, layout="constrained")
    colors = dict(zip(providers, pyplot.get_cmap("tab10").colors * 2, strict=False)) | {"eager": "0.65"}
    places, ticks, place = [], [], 0.0
    for case in cases:
        group = [row for row in rows if row["case"] == case]
        places += [(place + i, row) for i, row in enumerate(group)]
        ticks.append(place + (len(group) - 1) / 2)
        place += len(group) + 1
    for axis, key in zip(axes, ("ratio_eager", "extra_mib"), strict=True):
        for y, row in places:
            if row.get(key) is not None:
                axis.barh(y, row[key], color=colors[row["provider"]])
                axis.text(row[key], y, f" {number(row[key])}", va="center", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].set_yticks(ticks, cases)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="0.6", linewidth=0.8)
    axes[0].set_xlabel("speed-up over the eager reference")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("peak extra memory, MiB")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[p]) for p in providers]
    figure.legend(handles, providers, title=title, loc="outside upper center", ncols=len(providers), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Peak memory and speed against batch, one row of axes a case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(
        len(cases), 2, figsize=(11, 0.8 + 2.6 * len(cases)), squeeze=False, layout="constrained"
    )
    colors = dict(zip(TRAINED, ("0.65", "0.4", *pyplot.get_cmap("tab10").colors), strict=False))
    for case, (memory, speed) in zip(cases, axes, strict=True):
        for provider in (p for p in TRAINED if any(row["provider"] == p for row in rows)):
            points = [row for row in rows if row["case"] == case and row["provider"] == provider]
            batches = [row["batch"] for row in points]
            for axis, key in ((memory, "extra_mib"), (speed, "texts_per_s")):
                axis.plot(batches, [row[key] for row in points], "o-", color=colors[provider], label=provider)
        for axis, what in ((memory, "peak, MiB"), (speed, "texts/s")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(what)
            axis.set_title(case, fontsize=9)
            axis.set_xticks(sorted({row["batch"] for row in rows}), labels=sorted({row["batch"] for row in rows}))
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("batch, queries")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
