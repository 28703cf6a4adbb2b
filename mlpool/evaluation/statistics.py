"""The tests behind `compare`: signed ranks over data sets, Holm, an interval for the mean, randomisation over items.

Each is exact or holds its level where it is used, at the 1 to 15 data sets of a task type; `benchmarks/calibration.py`
shows by simulation which levels hold, and why the interval is Student's and not a bootstrap.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

try:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from scipy import stats
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"comparing results needs {error.name}: pip install 'mlpool[eval]'") from error

DECIMALS = 12  # scores closer than this are equal: their mean over seeds has rounding errors
_CHUNK_BYTES = 32 << 20  # of random signs at a time


class SignedRank(NamedTuple):
    """Wilcoxon's signed-rank test of paired differences.

    p: exact, two-sided. smallest_p: the least p that this many non-zero differences can reach, 2 / 2ⁿ. effect:
    matched-pairs rank-biserial correlation, (W₊ − W₋) / (W₊ + W₋), from -1 to 1; 0 when all differences are zero. wins,
    losses, zeros: how many differences are above, below and equal to zero. method: how p was found.
    """

    p: float
    smallest_p: float
    effect: float
    wins: int
    losses: int
    zeros: int
    method: str


class Randomisation(NamedTuple):
    """A paired randomisation test over items.

    difference: the mean. p: two-sided Monte Carlo, (1 + as extreme) / (1 + permutations). smallest_p: the least it
    could have been, 1 / (1 + permutations) or, with k items that differ, 2 / 2ᵏ. n: items. permutations: how many were
    drawn.
    """

    difference: float
    p: float
    smallest_p: float
    n: int
    permutations: int


# --- over data sets ---------------------------------------------------------------------------------------------------


def signed_rank(differences: ArrayLike) -> SignedRank:
    """Wilcoxon's test, exact at every n: zeros are dropped (Wilcoxon), ties share their mean rank.

    Without ties it is scipy's exact distribution; with ties the same one over the ranks as they are: every sign equally
    likely. (scipy's own choice for ties is that up to n = 13 and a normal approximation above.)
    """
    d = np.round(np.asarray(differences, dtype=np.float64), DECIMALS)
    moved = d[d != 0]
    n, zeros = len(moved), int((d == 0).sum())
    dropped = f", {zeros} zero{'s' * (zeros > 1)} dropped" if zeros else ""
    if n == 0:
        return SignedRank(1.0, 1.0, 0.0, 0, 0, zeros, "all differences are zero")
    ranks = stats.rankdata(abs(moved))
    effect = float(ranks @ np.sign(moved) / ranks.sum())
    if len(np.unique(ranks)) == n:
        p, method = float(stats.wilcoxon(moved, method="exact").pvalue), "exact"
    else:
        p, method = _sign_flip_p(ranks, moved > 0), "exact, with ties"
    wins = int((moved > 0).sum())
    return SignedRank(p, min(1.0, 2.0 ** (1 - n)), effect, wins, n - wins, zeros, method + dropped)


def _sign_flip_p(ranks: NDArray, positive: NDArray) -> float:
    """Two-sided p of the sum of the positive ranks when every sign is a fair coin. Mean ranks count in halves."""
    halves = np.rint(2 * ranks).astype(int)
    probability = np.ones(1)
    for rank in halves:
        shifted = np.pad(probability, (rank, 0))
        probability = (np.pad(probability, (0, rank)) + shifted) / 2
    above = halves[positive].sum()
    return float(min(1.0, 2 * probability[: min(above, halves.sum() - above) + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the order given.

    As statsmodels' `multipletests`, which the tests hold it to; that one collects garbage at each call, 0.1 s and more.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order])
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def smallest_holm(p_values: Sequence[float], smallest: Sequence[float]) -> list[float]:
    """For each test the least corrected p its data could have reached, the other tests being as they are."""
    return [holm([*p_values[:i], least, *p_values[i + 1 :]])[i] for i, least in enumerate(smallest)]


def mean_interval(differences: ArrayLike) -> tuple[float, float] | None:
    """Student's 95 % t interval for the mean difference; None where there is no spread to judge by.

    Tried beside percentile, BCa and studentised bootstraps (`benchmarks/calibration.py`): it alone is exact for normal
    differences at any n, and at most cautious (96.5 %) under heavy tails. It covers 93 to 94 % at skewness 1 and 89 to
    91 % at skewness 2; the studentised bootstrap does better there, and worse (92 %) under heavy tails.
    """
    d = np.round(np.asarray(differences, dtype=np.float64), DECIMALS)
    if len(np.unique(d)) < 2:
        return None
    low, high = stats.ttest_1samp(d, 0).confidence_interval()
    return float(low), float(high)


# --- over items -------------------------------------------------------------------------------------------------------


def randomise(differences: ArrayLike, permutations: int = 9999, seed: int | Sequence[int] = 0) -> Randomisation:
    """Is the mean difference over items more than chance? Under the null each item's two results may be swapped, which
    turns the sign of its difference.

    Args:
        differences: [n], of the same items; averaged over seeds first where there are several.
        seed: as for `numpy.random.default_rng`; the same seed gives the same p.
    """
    d = np.asarray(differences, dtype=np.float64)
    moved = d[np.round(d, DECIMALS) != 0]
    drawn = np.concatenate([signs @ moved for signs in _signs(len(moved), permutations, seed)])
    extreme = int((abs(drawn) >= abs(moved.sum()) - len(d) * 10.0**-DECIMALS).sum())  # equal but for rounding counts
    p, least = (extreme + 1) / (permutations + 1), max(1 / (permutations + 1), min(1.0, 2.0 ** (1 - len(moved))))
    return Randomisation(float(d.mean()), p, min(p, least), len(d), permutations)


def spearman_differences(a: ArrayLike, b: ArrayLike, gold: ArrayLike) -> NDArray[np.float64]:
    """Per item what it adds to the difference of two Spearman correlations: [n], and the mean is the difference.

    The models' predictions are put on one scale, their ranks, and an item's two may be swapped there; then each side is
    ranked again and correlated with gold. That needs no ranking per swap. With K(x, y) = 1 for x < y and ½ for x = y,
    side a's sum of gold times rank is Σᵢⱼ gᵢ K(aⱼ, aᵢ); less b's it is linear in the signs of the swaps: item i adds

        ± ½ [gᵢ (J(aᵢ) − J(bᵢ)) + H(aᵢ) − H(bᵢ)],  J(x) = Σⱼ K(aⱼ, x) + K(bⱼ, x),  H(x) = Σⱼ gⱼ (K(x, aⱼ) + K(x, bⱼ))

    The length of the ranks is taken without ties, so with many predictions that tie within a model the mean is a little
    nearer to 0 than the difference.

    Args:
        a, b: [n] or [seeds, n] predictions; with several seeds an item is swapped in all together, and the result is
            the mean over all pairs of seeds. gold: [n].
    """
    gold = standard_ranks(np.asarray(gold))
    n = len(gold)
    added = [
        _swap_effect(x, y, gold)
        for x in stats.rankdata(np.atleast_2d(a), axis=-1)
        for y in stats.rankdata(np.atleast_2d(b), axis=-1)
    ]
    return n * np.mean(added, axis=0) / np.sqrt((n**3 - n) / 12)


def _swap_effect(a: NDArray, b: NDArray, gold: NDArray) -> NDArray:
    both = np.concatenate([a, b])
    joint = stats.rankdata(both)
    _, place = np.unique(both, return_inverse=True)
    weights = np.bincount(place, np.tile(gold, 2))
    above = (weights.sum() - weights.cumsum() + weights / 2)[place]
    return (gold * np.subtract(*np.split(joint, 2)) + np.subtract(*np.split(above, 2))) / 2


def standard_ranks(x: NDArray) -> NDArray:
    """Ranks along the last dimension, mean 0 and length 1: a product of two is their Spearman correlation. Zeros where
    all values are equal."""
    ranks = stats.rankdata(x, axis=-1)
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def _signs(n: int, permutations: int, seed: int | Sequence[int]) -> Iterator[NDArray]:
    """`permutations` rows of n random signs, float64, some rows at a time."""
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK_BYTES // (8 * max(n, 1)))
    for start in range(0, permutations, rows):
        count = min(rows, permutations - start)
        bits = np.unpackbits(random.integers(0, 256, (count, -(-n // 8)), dtype=np.uint8), axis=1)[:, :n]
        yield 1.0 - 2.0 * bits
