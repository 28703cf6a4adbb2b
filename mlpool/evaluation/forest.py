"""The plot of a comparison: differences with their intervals."""

from pathlib import Path
from typing import Any

from ..show import COLORS, MARKERS, figure, save_figure


def forest(comparison: Any, path: str | Path) -> None:
    """Of a `Comparison`: mean difference to the baseline with its interval, a row per model × task type.

    Filled markers: shown after Holm. Intervals of fewer than 5 data sets do not set the scale; where one leaves it, an
    arrow says so.
    """
    rows = comparison.table
    models = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(row["task_type"] for row in rows))
    rows = sorted(rows, key=lambda row: (kinds.index(row["task_type"]), models.index(row["model"])))
    limit = reach(rows)
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
        axes.annotate(verdict(row), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    several = len(models) > 1
    names = [f"{r['task_type']}: {r['model']}" if several else r["task_type"] for r in rows]
    axes.set_yticks(heights, names, fontsize=9)
    axes.set(xlim=(-limit, limit), ylim=(heights[-1] + 0.7, -0.7))
    of = "" if several else f" of {models[0]}"
    axes.set_xlabel(f"mean difference in score{of} to {comparison.baseline}, 95 % interval")
    axes.set_title(f"filled marker: a difference is shown at {comparison.alpha:g} after Holm", fontsize=9, loc="left")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save_figure(fig, path)


def reach(rows: list[dict[str, Any]]) -> float:
    """How far from 0 a plot of these differences goes; intervals of fewer than 5 data sets do not count."""
    solid = [abs(row[end]) for row in rows for end in ("low", "high") if row["low"] is not None and row["n"] >= 5]
    return 1.08 * max([*solid, *(1.5 * abs(row["difference"]) for row in rows), 1e-3])


def verdict(row: dict[str, Any]) -> str:
    """Short: "n = 3: too small", "n = 8: higher (Holm p = 0.02)"."""
    said = row["verdict"].split(":")[0]
    if said == "n too small":
        return f"n = {row['n']}: too small"
    after = "" if said == "no difference" else f" (Holm p = {row['p_holm']:.2g})"
    return f"n = {row['n']}: {said}{after}"
