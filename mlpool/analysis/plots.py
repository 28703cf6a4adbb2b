"""Plots of layers and pools: colour-blind-safe, readable in grey, made without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..show import COLORS, MARKERS, figure, save_figure


def heat_maps(panels: Mapping[str, ArrayLike], xlabel: str, ylabel: str, path: str | Path) -> None:
    """Matrices [rows, columns] by title, two in a row, on one scale (viridis, to 1).

    The first row of a matrix is at the bottom, so that layers count upwards; numbers are written into small ones.
    """
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
    save_figure(fig, path)


def layer_curves(curves: Mapping[str, ArrayLike], own: float, ylabel: str, path: str | Path) -> None:
    """A score by layer, from 0, for each token pooling; the best layer of each starred; the model's own as a line."""
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
    save_figure(fig, path)


def pool_profile(profile: Any, path: str | Path) -> None:
    """Of a `PoolProfile`: bars of what it reads with their spread over texts, maps of its heads and latents."""
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
    save_figure(fig, path)


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
