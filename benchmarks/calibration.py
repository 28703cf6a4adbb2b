"""Do the tests and intervals of `mlpool compare` hold their level? About half a minute on one core.

    python benchmarks/calibration.py

1. Signed-rank test without a difference: how often p ≤ 5 %. Over all 2ⁿ signs, which are equally likely then, so the
   figure is exact; and simulated with rounded scores, where ties and zeros occur.
2. Tests over items without a difference, simulated.
3. Intervals for the mean difference of n data sets: how often they hold the true mean, against 95 % ± 1.5. Student's t
   is what `compare` prints; the others are why.

An x marks what leaves its level. The exit status is 1 if a test does, or Student's t where it is said to hold.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from summary import markdown

from mlpool.evaluation.statistics import mean_interval, randomise, signed_rank, spearman_differences

ALPHA, BOUND = 5.0, 1.5  # percent
SIZES = (6, 8, 11, 14)  # data sets in a task type of the paper
ATTAINABLE = (3.1, 3.9, 4.2, 4.9)  # percent, of the exact signed-rank test at those sizes
TIED_DRAWS, ITEM_DRAWS, INTERVAL_DRAWS = 2_000, 10_000, 20_000
BOOTSTRAP_DRAWS, BATCH, RESAMPLES = 3_000, 100, 999
ITEMS, PERMUTATIONS = 150, 199  # 5 % of 1 + 199 is a whole number, so exactly 5 % can be reached

Random = np.random.Generator
Interval = tuple[NDArray, NDArray]

# name → (differences with mean zero, does Student's t hold its level on them?)
SHAPES: dict[str, tuple[Callable[[Random, tuple[int, int]], NDArray], bool]] = {
    "normal": (lambda r, s: r.standard_normal(s), True),
    "heavy tails: t with 5 degrees": (lambda r, s: r.standard_t(5, s), True),
    "heavy tails: t with 3 degrees": (lambda r, s: r.standard_t(3, s), True),
    "heavy tails: Laplace": (lambda r, s: r.laplace(size=s), True),
    "one in ten 3 times as far": (lambda r, s: r.standard_normal(s) * np.where(r.random(s) < 0.1, 3, 1), True),
    "one in seven 2 sd better": (lambda r, s: r.standard_normal(s) + 2 * (r.random(s) < 1 / 7) - 2 / 7, True),
    "gamma, skewness 0.5": (lambda r, s: r.gamma(16, size=s) - 16, True),
    "gamma, skewness 1": (lambda r, s: r.gamma(4, size=s) - 4, False),
    "exponential, skewness 2": (lambda r, s: r.exponential(size=s) - 1, False),
}


def main() -> int:
    start, good = time.perf_counter(), True
    for title, part in (
        ("Signed-rank test: % rejected without a difference, by number of data sets", signed_ranks),
        (f"Tests over {ITEMS} items, {PERMUTATIONS} permutations: % rejected without a difference", items),
        ("Intervals: % that hold the true mean, by number of data sets", intervals),
    ):
        header, lines, held = part(np.random.default_rng(0))
        print(f"\n{title}\n", *markdown(header, lines), sep="\n", flush=True)
        good &= held
    print(f"\n{'every level held' if good else 'a LEVEL WAS MISSED'}; {time.perf_counter() - start:.0f} s")
    return 0 if good else 1


# --- tests ------------------------------------------------------------------------------------------------------------


def rejected(p_values: ArrayLike) -> float:
    return 100 * float(np.mean(np.asarray(p_values) <= ALPHA / 100))


def signed_ranks(random: Random) -> tuple[list[str], list[list[str]], bool]:
    exact = []
    for n in SIZES:
        signed = np.array(list(itertools.product(*((size, -size) for size in range(1, n + 1)))))
        _, first, counts = np.unique(signed.sum(1), return_index=True, return_counts=True)  # the same sum, the same p
        exact.append(rejected(np.repeat([signed_rank(d).p for d in signed[first]], counts)))
    tied = [
        rejected([signed_rank(random.standard_normal(n).round(1) * 0.01).p for _ in range(TIED_DRAWS)]) for n in SIZES
    ]
    held = [round(found, 1) == expected for found, expected in zip(exact, ATTAINABLE, strict=True)]
    noise = 300 * np.sqrt(0.05 * 0.95 / TIED_DRAWS)
    fine = [found <= ALPHA + noise for found in tied]
    lines = [
        ["attainable by an exact test", *map(str, ATTAINABLE)],
        ["all signs", *(cell(*pair, places=2) for pair in zip(exact, held, strict=True))],
        ["rounded: ties and zeros (at most 5)", *(cell(*pair) for pair in zip(tied, fine, strict=True))],
    ]
    return ["", *map(str, SIZES)], lines, all(held + fine)


def items(random: Random) -> tuple[list[str], list[list[str]], bool]:
    def means(kind: str) -> float:
        hard = random.beta(2, 1, ITEMS)  # chance of each item, the same for both models
        if kind == "0 or 1":
            a, b = (random.random((2, ITEMS)) < hard).astype(float)
        else:  # nDCG-like: from 0 to 1, often exactly either
            a, b = (hard + random.normal(0, 0.4, (2, ITEMS))).clip(0, 1)
        return randomise(a - b, PERMUTATIONS, int(random.integers(2**32))).p

    def spearman(kind: str) -> float:
        gold = random.standard_normal(ITEMS)
        noise = random.standard_normal((3, ITEMS))
        if kind == "seeds":  # 2 and 1, all as good
            a, b = gold + noise[:2], gold + noise[2:]
        elif kind == "scales":  # the second on another scale: ranks do not see it
            a, b = gold + noise[0], np.exp(3 * (gold + noise[1]))
        else:
            a, b = gold + noise[0], gold + noise[1]
        return randomise(spearman_differences(a, b, gold.round(1)), PERMUTATIONS, int(random.integers(2**32))).p

    coarse = "means of 0 or 1 (accuracy): few distinct sums, cautious"
    cases = {
        coarse: lambda: means("0 or 1"),
        "means of values in [0, 1] (nDCG)": lambda: means("values"),
        "Spearman": lambda: spearman("plain"),
        "Spearman, predictions on different scales": lambda: spearman("scales"),
        "Spearman, two seeds against one": lambda: spearman("seeds"),
    }
    lines, good = [], True
    for name, draw in cases.items():
        found = rejected([draw() for _ in range(ITEM_DRAWS)])
        held = (2.5 if name == coarse else ALPHA - 0.7) <= found <= ALPHA + 0.7
        lines.append([name, cell(found, held)])
        good &= held
    return ["", "5 attainable"], lines, good


# --- intervals --------------------------------------------------------------------------------------------------------


def intervals(random: Random) -> tuple[list[str], list[list[str]], bool]:
    lines, good = [], True
    for shape, (draw, should_hold) in SHAPES.items():
        found: dict[str, list[str]] = {}
        for n in SIZES:
            wide, few = draw(random, (INTERVAL_DRAWS, n)), draw(random, (BOOTSTRAP_DRAWS, n))
            for method, interval in {"Student t": student(wide), **bootstraps(few, random)}.items():
                low, high = interval
                cover = 100 * float(np.mean((low <= 0) & (high >= 0)))
                held = round(abs(cover - 95), 1) <= BOUND
                found.setdefault(method, []).append(cell(cover, held))
                good &= held or method != "Student t" or not should_hold
        lines += [[shape, method, *cells] for method, cells in found.items()]
    return ["differences", "interval", *map(str, SIZES)], lines, good


def student(x: NDArray) -> Interval:
    """Of every row, as `mean_interval` gives it one by one (checked on some)."""
    n = x.shape[1]
    mean, half = x.mean(1), stats.t.ppf(0.975, n - 1) * x.std(1, ddof=1) / np.sqrt(n)
    for i in range(20):
        np.testing.assert_allclose(mean_interval(x[i]), (mean[i] - half[i], mean[i] + half[i]), atol=1e-9)  # type: ignore
    return mean - half, mean + half


def bootstraps(x: NDArray, random: Random) -> dict[str, Interval]:
    """Percentile, BCa and studentised intervals of every row. The rows of a batch share their resamples."""
    parts = [_bootstraps(batch, random) for batch in np.split(x, range(BATCH, len(x), BATCH))]
    return {
        name: (np.concatenate([p[name][0] for p in parts]), np.concatenate([p[name][1] for p in parts]))
        for name in parts[0]
    }


def _bootstraps(x: NDArray, random: Random) -> dict[str, Interval]:
    n = x.shape[1]
    mean = x.mean(1, keepdims=True)
    counts = random.multinomial(n, np.full(n, 1 / n), RESAMPLES).T / n
    means = x @ counts
    variance = ((x - mean) ** 2 @ counts - (means - mean) ** 2) / (n - 1)
    error = x.std(1, ddof=1, keepdims=True) / np.sqrt(n)
    t = np.divide(means - mean, np.sqrt(np.maximum(variance, 0)), out=np.zeros_like(means), where=variance > 1e-12)

    left_out = -(x - mean)  # of the jackknife, up to a factor
    bias = stats.norm.ppf((means < mean).mean(1, keepdims=True))
    curve = (-(left_out**3)).sum(1, keepdims=True) / (6 * (left_out**2).sum(1, keepdims=True) ** 1.5)
    z = bias + stats.norm.ppf([0.025, 0.975])
    bca = quantiles(means, stats.norm.cdf(bias + z / (1 - curve * z)))
    tails, plain = np.array([[0.025, 0.975]]).repeat(len(x), 0), mean[:, 0]
    low_t, high_t = quantiles(t, tails)
    return {
        "percentile bootstrap": quantiles(means, tails),
        "BCa bootstrap": bca,
        "studentised bootstrap": (plain - high_t * error[:, 0], plain - low_t * error[:, 0]),
    }


def quantiles(x: NDArray, levels: NDArray) -> Interval:
    """Two quantiles of each row, at levels [rows, 2] of its own."""
    at = (levels * (x.shape[1] - 1)).round().astype(int)
    low, high = np.take_along_axis(np.sort(x, 1), at, 1).T
    return low, high


def cell(percent: float, held: bool, places: int = 1) -> str:
    return f"{percent:.{places}f}" + ("" if held else " x")


if __name__ == "__main__":
    sys.exit(main())
