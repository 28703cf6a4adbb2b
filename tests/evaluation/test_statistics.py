"""The statistics against scipy, statsmodels and brute force, and their levels without a difference."""

import importlib
import sys

import numpy as np
import pytest
from scipy import stats

from mlpool.evaluation import statistics
from mlpool.evaluation.statistics import (
    holm,
    mean_interval,
    randomise,
    signed_rank,
    smallest_holm,
    spearman_differences,
    standard_ranks,
)


def cases(count: int = 200):
    """Differences of 1 to 16 data sets: a third untied, a third with ties, a third with ties and zeros."""
    random = np.random.default_rng(7)
    for i in range(count):
        d = random.normal(0.2, 1, random.integers(1, 17))
        yield d if i % 3 == 0 else d.round(0 if i % 3 == 2 else 1) + (0 if i % 3 == 2 else 1e-3)


def all_signs(n: int) -> np.ndarray:
    return 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)[::-1]) & 1)


def test_signed_rank_agrees_with_scipy_and_all_signs():
    kinds = set()
    for d in cases():
        found, moved = signed_rank(d), d[np.round(d, 12) != 0]
        if not len(moved):
            assert found.p == found.smallest_p == 1
            continue
        ranks = stats.rankdata(abs(moved))
        tied = len(set(ranks)) < len(ranks)
        kinds.add((tied, found.zeros > 0))
        if not tied:
            assert found.p == stats.wilcoxon(moved, method="exact").pvalue
        elif len(d) <= 9:  # scipy's other exact way, by all signs too, slow
            assert found.p == pytest.approx(stats.wilcoxon(d, method=stats.PermutationMethod()).pvalue, abs=1e-12)
        sums = all_signs(len(moved)) @ ranks
        assert found.p == pytest.approx((abs(sums) >= abs(ranks @ np.sign(moved)) - 1e-9).mean(), abs=1e-12)
        assert found.smallest_p == min(1, (abs(sums) >= ranks.sum() - 1e-9).mean())
        assert (found.wins, found.losses) == ((moved > 0).sum(), (moved < 0).sum())
        assert found.zeros == len(d) - len(moved)
    assert kinds >= {(False, False), (True, False), (True, True)}


def test_effect_size_counts_walsh_averages():
    for d in cases():
        moved = d[d != 0]
        i, j = np.triu_indices(len(moved))
        averages = np.sign(np.round(moved[i] + moved[j], 9))
        assert signed_rank(d).effect == pytest.approx(averages.mean() if len(moved) else 0, abs=1e-12)


def test_interval_agrees_with_scipy_and_statsmodels():
    from statsmodels.stats.weightstats import DescrStatsW

    for d in cases():
        found = mean_interval(d)
        if len(set(d)) == 1:
            assert found is None
            continue
        assert found == pytest.approx(stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d)), abs=1e-9)
        assert found == pytest.approx(DescrStatsW(d).tconfint_mean(0.05), abs=1e-9)


def test_holm_agrees_with_statsmodels_and_by_hand(monkeypatch):
    from statsmodels.stats.multitest import multipletests

    monkeypatch.setattr("gc.collect", lambda *_: 0)  # multipletests does, at each call
    random = np.random.default_rng(1)
    for _ in range(200):
        p = random.choice([0.001, 0.01, 0.03125, 0.2, 1.0, random.random()], random.integers(1, 12)).tolist()
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)
        by_hand, least = [0.0] * len(p), 0.0
        for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
            least = max(least, min(1, (len(p) - rank) * p[i]))
            by_hand[i] = least
        assert holm(p) == pytest.approx(by_hand, abs=1e-12)
    assert holm([]) == []


def test_smallest_holm_is_what_the_other_tests_leave_open():
    p, smallest = [0.0005, 0.5, 0.25], [0.0005, 0.03, 0.02]
    # 2nd: were it 0.03, only the first would be before it. 3rd likewise.
    assert smallest_holm(p, smallest) == pytest.approx([0.0015, 0.06, 0.04])


@pytest.mark.parametrize(("n", "percent"), [(6, 3.1), (8, 3.9), (11, 4.2), (14, 4.9)])
def test_signed_rank_rejects_at_its_attainable_level(n, percent):
    signed = all_signs(n) * np.arange(1, n + 1)
    _, first, counts = np.unique(signed.sum(1), return_index=True, return_counts=True)  # the same sum, the same p
    rejected = np.array([signed_rank(d).p <= 0.05 for d in signed[first]])
    assert round(100 * (rejected @ counts) / 2**n, 1) == percent


@pytest.mark.parametrize("n", [6, 8, 11, 14])
@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
def test_interval_covers(n, shape):
    random = np.random.default_rng(n)
    size = (1500, n)
    draws = {
        "normal": lambda: random.standard_normal(size), "heavy": lambda: random.standard_t(5, size),
        "skewed": lambda: random.gamma(16, size=size) - 16,
    }[shape]()  # fmt: skip
    low, high = stats.t.interval(0.95, n - 1, draws.mean(1), stats.sem(draws, 1))  # of all at once: one takes 1 ms
    for differences, *bounds in zip(draws[:20], low, high, strict=False):
        assert mean_interval(differences) == pytest.approx(bounds, abs=1e-9)
    covered = 100 * np.mean((low <= 0) & (high >= 0))
    # Half a point for 1,500 draws; benchmarks/calibration.py has more.
    assert 95 - 1.5 - 0.5 <= covered <= 95 + 1.5 + 0.5


@pytest.mark.parametrize("n", [1, 3, 9])
def test_randomisation_of_few_items_is_near_all_signs(n):
    d = np.random.default_rng(n).normal(0.5, 1, n)
    found = randomise(d, 20_000, seed=3)
    sums = all_signs(n) @ d
    assert found.p == pytest.approx((abs(sums) >= abs(d.sum()) - 1e-12).mean(), abs=0.01)
    assert found.smallest_p == pytest.approx(min(1, max(1 / 20_001, 2 / 2**n)), abs=0.01)
    assert (found.n, found.permutations) == (n, 20_000)
    assert found.difference == pytest.approx(d.mean())


def test_randomisation_agrees_with_scipy():
    a, b = np.random.default_rng(0).normal(0.05, 0.3, (2, 200)) + np.array([[0.03], [0]])
    found = randomise(a - b, 20_000)
    expected = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis), vectorized=True, permutation_type="samples",
        n_resamples=20_000, random_state=np.random.default_rng(1),
    )  # fmt: skip
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert 0.01 < found.p < 0.5


def test_randomisation_repeats_and_needs_little_memory(monkeypatch):
    d = np.random.default_rng(0).normal(0.1, 1, 300)
    whole = randomise(d, 5000, seed=1)
    assert randomise(d, 5000, seed=1) == whole
    assert randomise(d, 5000, seed=2) != whole
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 10_000)  # four rows at a time
    assert randomise(d, 5000, seed=1).p == pytest.approx(whole.p, abs=0.02)
    assert max(len(part) for part in statistics._signs(300, 5000, 1)) == 4
    assert sum(len(part) for part in statistics._signs(300, 5000, 1)) == 5000


def test_equal_models_cannot_differ():
    found = randomise(np.zeros(50), 99)
    assert (found.p, found.smallest_p, found.difference) == (1, 1, 0)


@pytest.mark.parametrize("ties", ["none", "gold", "both"])
def test_spearman_differences_are_every_swap_ranked_again(ties):
    random = np.random.default_rng(5)
    n = 8
    a, b, gold = random.standard_normal((3, n)) * 2
    b = np.exp(b)  # another scale
    gold = gold if ties == "none" else gold.round()
    if ties == "both":
        a, b = a.round(), b.round()
    added = spearman_differences(a, b, gold)
    rank_a, rank_b, weights = stats.rankdata(a), stats.rankdata(b), standard_ranks(gold)
    for signs in all_signs(n):
        left, right = np.where(signs > 0, rank_a, rank_b), np.where(signs > 0, rank_b, rank_a)
        swapped = (stats.rankdata(left) - stats.rankdata(right)) @ weights / np.sqrt((n**3 - n) / 12)
        assert (signs * added).mean() == pytest.approx(swapped, abs=1e-12)
    if ties != "both":
        expected = stats.spearmanr(a, gold)[0] - stats.spearmanr(b, gold)[0]
        assert added.mean() == pytest.approx(expected, abs=1e-12)


def test_spearman_differences_average_seeds():
    random = np.random.default_rng(6)
    gold = random.standard_normal(40)
    a, b = gold + random.standard_normal((3, 40)), gold + random.standard_normal((2, 40))
    means = [np.mean([stats.spearmanr(x, gold)[0] for x in side]) for side in (a, b)]
    assert spearman_differences(a, b, gold).mean() == pytest.approx(means[0] - means[1], abs=1e-12)


def test_spearman_of_constants_is_no_nan():
    x = np.random.default_rng(0).standard_normal(20)
    flat = np.zeros(20)
    assert (spearman_differences(x, flat, flat) == 0).all()
    assert (spearman_differences(flat, flat, x) == 0).all()
    assert spearman_differences(x, flat, x).mean() == pytest.approx(1)
    assert (standard_ranks(flat) == 0).all()


@pytest.mark.parametrize("kind", ["mean", "spearman"])
def test_randomisation_holds_its_level(kind):
    random = np.random.default_rng(11)
    p = []
    for i in range(1500):
        gold, *noise = random.standard_normal((3, 80))
        a, b = gold + noise[0], gold + noise[1]
        p.append(randomise(spearman_differences(a, b, gold) if kind == "spearman" else a - b, 199, seed=i).p)
    assert 3.5 <= 100 * np.mean(np.array(p) <= 0.05) <= 6.7  # 5, and three standard errors


def test_a_missing_extra_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "mlpool.evaluation.statistics")
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy: pip install 'mlpool\[eval\]'"):
        importlib.import_module("mlpool.evaluation.statistics")
