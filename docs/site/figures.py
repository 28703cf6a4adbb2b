"""The figures of README and docs: speed and memory from the committed CSV files, what each design reads, what it costs;
then the numbers that they quote (results.py) and the gallery of all files (gallery.py).

    make plots        # PYTHONPATH=.:kernels python docs/site/figures.py

SVG that reads on white and on black, the same bytes for the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

import gallery
import matplotlib
import studies
from results import CPU, EVAL, GPU, ROOT, Shown, main, mebibytes, milliseconds, pair, times

matplotlib.use("svg")
from matplotlib import pyplot

FIGURES = ROOT / "docs" / "figures"
INK, EAGER, OURS, QUIET = "#8b8f98", "#a3a7b0", "#4263eb", "#8b8f9833"
STYLE = {
    "svg.hashsalt": "mlpool", "svg.fonttype": "path", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "savefig.transparent": True,
}  # fmt: skip


def save(figure: Any, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    pyplot.close(figure)
    print(f"docs/figures/{name}.svg")


# --- README's ---------------------------------------------------------------------------------------------------------

BARS = (
    Shown("Qwen2-0.5B, embed\nH200", "qwen2-0.5b", EVAL, 256, GPU),
    Shown("Qwen2-0.5B, train\nH200", "qwen2-0.5b", "forward+backward", 256, GPU),
    Shown("Mistral-7B, embed\nH200", "mistral-7b", EVAL, 64, GPU),
    Shown("Mistral-7B, train\nH200", "mistral-7b", "forward+backward", 64, GPU),
    Shown("Qwen2-0.5B, embed\n2 CPU cores", "qwen2-0.5b", EVAL, 16, CPU),
    Shown("Qwen2-0.5B, train\n2 CPU cores", "qwen2-0.5b", "forward+backward", 16, CPU),
)


def speed() -> None:
    """Eager and ours, time and memory of a batch, each as a share of eager's: shorter is better."""
    found = [(shown, rows) for shown in BARS if (rows := pair(shown))]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.6 + 0.55 * len(found)), sharey=True, layout="constrained")
    columns = (("time of a batch", "median_ms", milliseconds), ("extra memory", "extra_mib", mebibytes))
    for axis, (what, key, written) in zip(axes, columns, strict=True):
        for i, (_, (eager, ours)) in enumerate(found):
            share = float(ours[key]) / float(eager[key])
            axis.barh(i - 0.2, 1, 0.36, color=EAGER)
            axis.barh(i + 0.2, share, 0.36, color=OURS)
            axis.text(1.01, i - 0.2, written(eager[key]), va="center")
            less = f"{written(ours[key])}   {times(1 / share)} {'faster' if key == 'median_ms' else 'less'}"
            axis.text(share + 0.01, i + 0.2, less, va="center", color=OURS, weight="bold")
        axis.set_title(f"{what}, shorter is better", loc="left", fontsize=10, color=INK)
        axis.spines["bottom"].set_visible(False)
        axis.set_xticks([])
        axis.set_xlim(0, 1.2)
        axis.tick_params(length=0)
    axes[0].set_yticks(range(len(found)), [shown.name for shown, _ in found])

    axes[0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (EAGER, OURS)]
    figure.legend(handles, ("eager PyTorch", "mlpool"), loc="outside upper left", ncols=2, frameon=False)
    save(figure, "speed")


# --- what a design reads ----------------------------------------------------------------------------------------------

TOKENS, LAYERS = 6, 6


def cells(design: Any) -> list[tuple[int, int]]:
    """(layer, token) of a text that the design's pool reads."""
    layers = range(LAYERS) if design.reads_all_layers else [LAYERS - 1]
    tokens = [TOKENS - 1] if design.token_pooling == "last" else range(TOKENS)
    return [(layer, token) for layer in layers for token in tokens]


def designs() -> None:
    """A grid of layers and tokens for every design."""
    from mlpool import DESIGNS

    figure, axes = pyplot.subplots(3, 3, figsize=(9, 6.2), layout="constrained")
    for axis, design in zip(axes.flat, DESIGNS.values(), strict=True):
        read = cells(design)
        for layer in range(LAYERS):
            for token in range(TOKENS):
                color = OURS if (layer, token) in read else QUIET
                axis.add_patch(pyplot.Rectangle((token + 0.06, layer + 0.06), 0.88, 0.88, color=color, linewidth=0))
        axis.set_xlim(-0.1, TOKENS + 0.1)
        axis.set_ylim(-1.3, LAYERS + 0.1)
        both = design.attention == "bidirectional"
        axis.annotate(
            "", (TOKENS - 0.5, -0.45), (0.5, -0.45), arrowprops={"arrowstyle": "<->" if both else "->", "color": INK}
        )
        number = f"{design.number}  " if design.number else ""
        axis.set_title(f"{number}{design.name}", fontsize=9, color=INK, loc="left")
        kinds = {"EosPool": "one row", "MeanPool": "the mean", "LayerWeightsPool": "one weight a layer"}
        row = "last tokens" if design.token_pooling == "last" else "means of tokens"
        pooled = f"latents attend over {'the tokens' if not design.reads_all_layers else 'the ' + row}"
        if design.pool.__name__ == "LastLayerPool" and design.token_pooling == "last":
            pooled = "latents attend over one row"
        axis.text(TOKENS / 2, -1.25, kinds.get(design.pool.__name__, pooled), ha="center", fontsize=8)
        axis.set_aspect("equal")
        axis.axis("off")
    save(figure, "designs")


# --- what it costs ----------------------------------------------------------------------------------------------------

COSTS = (("Qwen2-0.5B", 896, 24), ("Mistral-7B", 4096, 32))


def cost() -> None:
    """GFLOP of a text, step by step, as released and here, as `plan()` of the released pool counts them."""
    import torch
    from mlpool_kernels.plan import Sizes, choose, default_rates

    from mlpool.pooling.report import PlanReport

    figure, axes = pyplot.subplots(1, len(COSTS), figsize=(9, 2.4), layout="constrained")
    for axis, (name, hidden, layers) in zip(axes, COSTS, strict=True):
        sizes = Sizes(16, layers, hidden, latents=768, heads=32, head_dim=2048, width=4 * hidden)
        plan = choose(sizes, training=False, cached=True, triton=False, itemsize=4, memory_bytes=2**36)
        report = PlanReport.of(
            "", sizes, plan, default_rates("cpu", 4), torch.device("cpu"), torch.float32, triton=False, masked=False,
            tokens=None, training=False,
        )  # fmt: skip
        bars(axis, [row[0] for row in report.rows], *([row[i] / 1e9 for row in report.rows] for i in (3, 2)))
        total, reference = (sum(row[i] for row in report.rows) for i in (2, 3))
        title = f"{name} sizes: {reference / 1e9:,.0f} → {total / 1e9:,.0f} GFLOP a text"
        axis.set_title(title, fontsize=10, color=INK)
    save(figure, "cost")


def bars(axis: Any, names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> None:
    for i, (eager, ours) in enumerate(zip(before, after, strict=True)):
        axis.barh(i - 0.2, eager, 0.36, color=EAGER)
        axis.barh(i + 0.2, ours, 0.36, color=OURS)
        axis.text(eager, i - 0.2, f" {eager:,.3g}", va="center")
        axis.text(ours, i + 0.2, f" {ours:,.3g}", va="center", color=OURS, weight="bold")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.spines["bottom"].set_visible(False)
    axis.set_xticks([])
    axis.margins(x=0.15)
    axis.invert_yaxis()


# --- what it is worth -------------------------------------------------------------------------------------------------


def scores() -> None:
    """Every design of a study, a panel for each kind of task: its seeds, and their mean."""
    shown, lines = studies.TABLES["designs"], studies.read(studies.SCORES)
    rows = sorted(shown.rows, key=lambda row: -studies.means(shown, row, lines)[-1])
    columns = {**shown.columns, "all": [task for tasks in shown.columns.values() for task in tasks]}
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(9, 0.7 + 0.27 * len(rows)), sharey=True, layout="constrained"
    )
    for axis, (what, tasks) in zip(axes, columns.items(), strict=True):
        for i, row in enumerate(rows):
            seeds = [mean(of[task] for task in tasks) for of in studies.scores(shown, row, lines).values()]
            color = OURS if "multi-layer" in row and "released" not in row else INK
            axis.plot(seeds, [i] * len(seeds), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
            axis.plot([mean(seeds)], [i], "|", color=color, markersize=10, markeredgewidth=2)
        axis.set_title(what, loc="left", fontsize=9, color=INK)
        axis.grid(axis="y", color=QUIET)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [shown.rows[row] for row in rows])
    axes[0].invert_yaxis()
    save(figure, "scores")


if __name__ == "__main__":
    pyplot.rcParams |= STYLE
    for draw in (speed, designs, cost, scores):
        draw()
    sys.exit(main() or gallery.main())
