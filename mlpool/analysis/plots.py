"""Plots of the evaluation: colour-blind-safe (Okabe and Ito), readable in grey, made without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..evaluation.compare import Comparison
    from .profiles import PoolProfile

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
DPI = 150


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, outside pyplot: no display, nothing global."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'mlpool[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def forest(comparison: Comparison, path: str | Path) -> None:
    """Mean difference to the baseline with its interval, a row per model × task type; filled markers: shown after Holm.

    Intervals of fewer than 5 data sets do not set the scale; where one leaves it, an arrow says so.
    """
    rows = comparison.table
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["task_type"] for row in rows))
    rows = sorted(rows, key=lambda row: (kinds.index(row["task_type"]), models.index(row["model"])))
    solid = [abs(row[end]) for row in rows for end in ("low", "high") if row["low"] is not None and row["n"] >= 5]
    limit = 1.08 * max([*solid, *(1.5 * abs(row["difference"]) for row in rows), 1e-3])

    fig = figure(10, 1.3 + 0.34 * len(rows) + 0.12 * len(kinds))
    axes = fig.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    heights = [i + 0.5 * kinds.index(row["task_type"]) for i, row in enumerate(rows)]  # a gap between task types
    for row, y in zip(rows, heights, strict=True):
        style = models.index(row["model"])
        color, marker = COLORS[style % len(COLORS)], MARKERS[style % len(MARKERS)]
        if row["low"] is not None:
            low, high = max(row["low"], -limit), min(row["high"], limit)
            axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
            for end, cut, arrow in ((low, row["low"] < -limit, "<"), (high, row["high"] > limit, ">")):
                axes.plot(end, y, arrow if cut else "|", color=color, markersize=7, clip_on=False)
        face = color if row["verdict"].startswith(("higher", "lower")) else "white"
        axes.plot(row["difference"], y, marker, color=color, markerfacecolor=face, markersize=7)
        axes.annotate(_verdict(row), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    several = len(models) > 1
    axes.set_yticks(
        heights, [f"{r['task_type']}: {r['model']}" if several else r["task_type"] for r in rows], fontsize=9
    )
    axes.set(xlim=(-limit, limit), ylim=(heights[-1] + 0.7, -0.7))
    axes.set_xlabel(
        f"mean difference in score{'' if several else f' of {models[0]}'} to {comparison.baseline}, 95 % interval"
    )
    axes.set_title(f"filled marker: a difference is shown at {comparison.alpha:g} after Holm", fontsize=9, loc="left")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    fig.savefig(path, dpi=DPI)


def _verdict(row: dict[str, Any]) -> str:
    verdict = row["verdict"].split(":")[0]
    if verdict == "n too small":
        return f"n = {row['n']}: too small"
    after = "" if verdict == "no difference" else f" (Holm p = {row['p_holm']:.2g})"
    return f"n = {row['n']}: {verdict}{after}"


# --- layers -----------------------------------------------------------------------------------------------------------


def heat_maps(panels: Mapping[str, ArrayLike], xlabel: str, ylabel: str, path: str | Path) -> None:
    """Matrices [rows, columns] by title, two in a row, on one scale (viridis, to 1).

    The first row of a matrix is at the bottom, so that layers count upwards; numbers are written into small ones.
    """
    import numpy as np

    matrices = {title: np.asarray(values, float) for title, values in panels.items()}
    columns = min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    fig = figure(4.6 * columns + 0.8, 4.2 * rows)
    grid = fig.subplots(rows, columns, squeeze=False)
    low = min(0.0, *(float(values.min()) for values in matrices.values()))
    for axes, (title, values) in zip(grid.flat, matrices.items(), strict=False):
        image = _heat_map(axes, values, low, 1.0)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    for axes in grid.flat[len(matrices) :]:
        axes.remove()
    fig.colorbar(image, ax=grid, shrink=0.8)
    fig.savefig(path, dpi=DPI)


def layer_curves(curves: Mapping[str, ArrayLike], own: float, ylabel: str, path: str | Path) -> None:
    """A score by layer, from 0, for each token pooling; the best layer of each starred; the model's own as a line."""
    import numpy as np

    fig = figure(7.5, 4.2)
    axes = fig.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        values = np.asarray(curve, float)
        best = int(values.argmax())
        color = COLORS[i % len(COLORS)]
        label = f"{name}, best {best}: {values[best]:.4f}"
        axes.plot(values, marker=MARKERS[i % len(MARKERS)], color=color, label=label)
        axes.plot(best, values[best], "*", color=color, markersize=18, markeredgecolor="white", zorder=3)
    axes.axhline(own, color="0.3", linestyle="--", linewidth=1.2, label=f"the model's embedding: {own:.4f}")
    axes.set(xlabel="layer (0 is the embedding)", ylabel=ylabel)
    _thin_ticks(axes.xaxis, range(max(len(np.asarray(curve)) for curve in curves.values())))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1))
    fig.savefig(path, dpi=DPI)


def pool_profile(profile: PoolProfile, path: str | Path) -> None:
    """What a pool reads of each layer: bars with the spread over texts, and its heads and latents as heat maps."""
    import numpy as np

    maps = {} if profile.attention.shape[:2] == (1, 1) else {"head": profile.by_head, "latent": profile.by_latent}
    count = len(profile.layers)
    fig = figure(max(7.5, 0.28 * count + 2), 3.4 + 3.2 * len(maps))
    axes, *below = np.atleast_1d(fig.subplots(1 + len(maps), 1))
    place = np.arange(count)
    varies = profile.spread is not None  # layer weights are the same for every text
    error = {"yerr": profile.spread, "capsize": 2} if varies else {}
    label = "weight, ± sd over texts" if varies else "weight"
    axes.bar(place - 0.2, profile.mean, 0.4, color=COLORS[0], label=label, **error)
    if profile.effective is not None:
        axes.bar(place + 0.2, profile.effective.mean(0), 0.4, color=COLORS[1], label="weight × length of the value")
    axes.axhline(1 / count, color="0.3", linestyle="--", linewidth=1.2, label="all alike")
    axes.set_ylabel("share")
    axes.set_title(profile.pool, loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes.set(xlim=(-0.5, count - 0.5), ylim=(0, None))
    _thin_ticks(axes.xaxis, profile.layers)
    axes.spines[["top", "right"]].set_visible(False)
    for part, (name, values) in zip(below, maps.items(), strict=True):
        image = _heat_map(part, values, 0, float(values.max()), xlabels=profile.layers)
        part.set(ylabel=name)
        fig.colorbar(image, ax=part, label="weight")
    (below[-1] if below else axes).set_xlabel("layer")
    fig.savefig(path, dpi=DPI)


def _heat_map(axes: Any, values: Any, low: float, high: float, xlabels: Sequence[int] | None = None) -> Any:
    image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, origin="lower", aspect="auto")
    rows, columns = values.shape
    _thin_ticks(axes.xaxis, range(columns) if xlabels is None else xlabels)
    _thin_ticks(axes.yaxis, range(rows))
    if max(rows, columns) <= 9:
        for row in range(rows):
            for column in range(columns):
                dark = values[row, column] < (low + high) / 2
                axes.text(
                    column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
    return image


def _thin_ticks(axis: Any, labels: Sequence[int]) -> None:
    """At most 17 labels, evenly spaced."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, len(labels)) if len(labels) <= 17 * step)
    axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
