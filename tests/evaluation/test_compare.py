"""`mlpool compare`: tables, verdicts, what is refused, and the tidy CSV it reads."""

import argparse
import csv
import io
import multiprocessing
import re

import numpy as np
import pytest
from scipy import stats

from mlpool.evaluation.compare import add_arguments, compare, run
from mlpool.evaluation.results import COLUMNS, Score, append, read, read_items, write, write_items

STS = [f"STS{i}" for i in range(12)]


def scores(model: str, values: dict[str, float] | list[float], kind: str = "STS", **more) -> list[Score]:
    named = values if isinstance(values, dict) else dict(zip(STS, values, strict=False))
    return [Score(model, task, kind, score, **more) for task, score in named.items()]


def pair(differences: list[float], kind: str = "STS") -> list[Score]:
    return scores("a", [0.5] * len(differences), kind) + scores("b", [0.5 + d for d in differences], kind)


def no_nan(found) -> None:
    text = found.markdown() + str(found) + found.to_csv() + found.to_csv(rows=found.datasets)
    assert not re.search(r"\b(nan|inf|None)\b", text, re.IGNORECASE), text


# --- what is computed -------------------------------------------------------------------------------------------------


def test_the_table_agrees_with_scipy_and_statsmodels(tmp_path):
    from statsmodels.stats.multitest import multipletests

    random = np.random.default_rng(0)
    kinds = {"STS": 12, "Retrieval": 9, "Clustering": 6}
    effects = {"a": 0, "b": 0.03, "c": 0.004}
    values: dict = {model: {} for model in effects}
    for model, effect in effects.items():
        for kind, n in kinds.items():
            values[model][kind] = {f"{kind}{i}": 0.6 + effect + random.normal(0, 0.01) for i in range(n)}
        rows = [row for kind, named in values[model].items() for row in scores(model, named, kind)]
        append(tmp_path / model / "results.csv", rows)
    found = compare([tmp_path / "a", tmp_path / "b", tmp_path / "c" / "results.csv"])
    assert found.baseline == "a"
    assert [(row["model"], row["task_type"]) for row in found.table] == [(m, k) for m in "bc" for k in kinds]
    for row in found.table:
        left, right = (np.array(list(values[m][row["task_type"]].values())) for m in (row["model"], "a"))
        assert row["n"] == kinds[row["task_type"]]
        assert row["p"] == stats.wilcoxon(left - right, method="exact").pvalue
        assert row["difference"] == pytest.approx((left - right).mean())
        assert (row["low"], row["high"]) == pytest.approx(stats.ttest_rel(left, right).confidence_interval(0.95))
        assert row["smallest_p"] == 2 / 2 ** row["n"]
    holm = multipletests([row["p"] for row in found.table], method="holm")[1]
    assert [row["p_holm"] for row in found.table] == pytest.approx(holm)
    verdicts = {(row["model"], row["task_type"]): row["verdict"] for row in found.table}
    assert verdicts["b", "STS"] == verdicts["b", "Retrieval"] == "higher"
    assert verdicts["c", "STS"] == "no difference shown"
    assert verdicts["b", "Clustering"].startswith("n too small: smallest reachable p = 0.031 (0.12 after Holm)")
    no_nan(found)


def test_seeds_are_averaged_first():
    rows = scores("a", [0.5] * 6)
    for seed, shift in enumerate((-0.02, 0, 0.05)):
        rows += scores("b", [0.5 + shift + 0.01 * i for i in range(6)], seed=seed)
    found = compare(rows)
    row = found.table[0]
    assert row["n"] == 6
    assert row["difference"] == pytest.approx(0.01 + 0.025)
    assert row["p"] == 2 / 2**6
    assert (row["model_seeds"], row["baseline_seeds"], row["baseline_seed_sd"]) == ("3", "1", None)
    assert row["model_seed_sd"] == pytest.approx(np.std([-0.02, 0, 0.05], ddof=1))
    assert "averaged over seeds first" in str(found)
    assert "One seed" in str(found)


def test_rounding_errors_of_averaged_seeds_are_no_difference():
    rows = []
    for model, seeds in (("a", (0.1, 0.2, 0.3)), ("b", (0.3, 0.1, 0.2))):
        for seed, score in enumerate(seeds):
            rows += scores(model, [score] * 8, seed=seed)
    assert compare(rows).table[0]["verdict"] == "no difference"


def test_baseline_and_order():
    rows = scores("a", [0.5] * 8) + scores("b", np.linspace(0.51, 0.6, 8).tolist())
    up, down = compare(rows).table[0], compare(rows, baseline="b").table[0]
    assert (up["verdict"], down["verdict"]) == ("higher", "lower")
    assert down["difference"] == -up["difference"]
    assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))
    with pytest.raises(ValueError, match=r"baseline 'model-b'.*'model-a'.*did you mean 'model-a'"):
        compare(scores("model-a", [0.5]) + scores("c", [0.5]), baseline="model-b")


def test_ranks_and_mean_may_point_apart():
    found = compare(pair([0.01 + 0.001 * i for i in range(11)] + [-0.4]))
    assert found.table[0]["verdict"] == "higher by ranks, though not in the mean"


# --- what cannot be shown ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_data_sets_are_refused_a_verdict(n):
    found = compare(pair([0.01 * (i + 1) for i in range(n)]))
    assert found.table[0]["verdict"] == f"n too small: smallest reachable p = {2 / 2**n:.2g}"
    no_nan(found)


def test_holm_can_make_n_too_small():
    rows = scores("a", [0.5] * 6)
    assert compare(rows + scores("b", [0.6 + 0.01 * i for i in range(6)])).table[0]["verdict"] == "higher"
    for name in "bc":
        rows += scores(name, [0.6 + 0.01 * i for i in range(6)])
    both = compare(rows).table
    assert {row["verdict"] for row in both} == {"n too small: smallest reachable p = 0.031 (0.062 after Holm)"}


def test_zeros_count_as_missing_data_sets():
    row = compare(pair([0.0, 0.0, 0.0, 0.01, 0.02, 0.03, 0.04])).table[0]
    assert (row["n"], row["ties"], row["smallest_p"]) == (7, 3, 2 / 2**4)
    assert row["verdict"].startswith("n too small: smallest reachable p = 0.12")


@pytest.mark.parametrize("differences", [[0.0] * 8, [0.0]])
def test_all_ties_are_no_difference_and_no_nan(differences, tmp_path):
    found = compare(pair(differences))
    assert found.table[0]["verdict"] == "no difference"
    assert (found.table[0]["p"], found.table[0]["effect"], found.table[0]["low"]) == (1, 0, None)
    no_nan(found)
    found.save(tmp_path)


def test_a_constant_difference_has_no_interval():
    found = compare(pair([0.1] * 8))
    assert (found.table[0]["low"], found.table[0]["verdict"]) == (None, "higher")
    no_nan(found)


# --- which data sets --------------------------------------------------------------------------------------------------


def test_only_common_data_sets_count_and_the_others_are_named():
    mine, theirs = {"x": 0.5, "y": 0.6, "z": 0.7}, {"y": 0.5, "z": 0.8, "w": 0.1}
    found = compare(scores("a", mine) + scores("b", theirs))
    assert [row["task"] for row in found.datasets] == ["y", "z"]
    assert any("only a has them: x." in note for note in found.notes)
    assert any("only b has them: w." in note for note in found.notes)


def test_nothing_in_common_names_both_sets():
    with pytest.raises(ValueError, match="no data set in common: b has z; a has x, y"):
        compare(scores("a", {"x": 0.5, "y": 0.5}) + scores("b", {"z": 0.5}))


def test_one_label_in_two_inputs_gets_the_inputs_name(tmp_path):
    for name, score in (("before", 0.5), ("after", 0.6)):
        append(tmp_path / name / "results.csv", scores("model", [score]))
    found = compare([tmp_path / "before", tmp_path / "after"])
    assert found.baseline == f"model ({tmp_path / 'before'})"
    assert found.table[0]["model"] == f"model ({tmp_path / 'after'})"
    with pytest.raises(ValueError, match="given twice"):
        compare([tmp_path / "before", tmp_path / "before"])
    with pytest.raises(ValueError, match="needs two models, found model"):
        compare([tmp_path / "before"])


def test_not_the_same_measurement():
    a = scores("a", {"x": 0.5}, metric="cosine_spearman", split="test")
    for other in ({"metric": "accuracy", "split": "test"}, {"metric": "cosine_spearman", "split": "dev"}):
        with pytest.raises(ValueError, match="not the same measurement"):
            compare(a + scores("b", {"x": 0.6}, **other))
    assert compare(a + scores("b", {"x": 0.6})).table  # a CSV that does not say is taken as it is
    with pytest.raises(ValueError, match=r"seed 1 twice.*identities aa and bb"):
        compare([*scores("a", {"x": 0.5}, seed=1, identity="aa"), *scores("a", {"x": 0.6}, seed=1, identity="bb")])


def test_splits():
    rows = [row for m, s in (("a", 0.5), ("b", 0.6)) for k in ("dev", "test") for row in scores(m, [s], split=k)]
    with pytest.raises(ValueError, match=r"split dev .* split test .*choose with split="):
        compare(rows)
    assert compare(rows, split="test").table[0]["n"] == 1
    with pytest.raises(ValueError, match="no rows of split 'train', only 'dev', 'test'"):
        compare(rows, split="train")


# --- tests over items -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_items(tmp_path):
    """Two models, an STS and a retrieval data set of 120 items, two seeds of b; the folder and what was predicted."""
    random = np.random.default_rng(3)
    gold, hard = random.integers(0, 6, 120) / 1.0, random.beta(2, 1, 120)
    ids = [f"q{i}" for i in range(120)]
    kept: dict = {"gold": gold}
    for model, seeds, noise, shift in (("a", [None], 1.5, 0), ("b", [0, 1], 0.8, 0.12)):
        rows = []
        for seed in seeds:
            predictions = gold + noise * random.standard_normal(120)
            values = (hard + shift + 0.1 * random.standard_normal(120)).clip(0, 1)
            order = random.permutation(120)  # files need not agree in order
            named = np.array(ids)[order]
            write_items(tmp_path / model / f"sts-{seed}.npz", named, prediction=predictions[order], gold=gold[order])
            write_items(tmp_path / model / f"ret-{seed}.npz", named, value=values[order])
            spearman = float(stats.spearmanr(predictions, gold)[0])
            rows.append(Score(model, "STSX", "STS", spearman, seed=seed, items=f"sts-{seed}.npz"))
            rows.append(Score(model, "Ret", "Retrieval", values.mean(), seed=seed, items=f"ret-{seed}.npz"))
            rows.append(Score(model, "Clu", "Clustering", 0.5, seed=seed))
            kept |= {(model, seed): predictions, (model, seed, "ret"): values}
        append(tmp_path / model / "results.csv", rows)
    return tmp_path, kept


def test_items_are_tested(with_items):
    folder, kept = with_items
    found = compare([folder / "a", folder / "b"], permutations=999)
    rows = {row["task"]: row for row in found.datasets}
    for task in ("STSX", "Ret"):
        assert (rows[task]["items"], rows[task]["permutations"]) == (120, 999)
        assert rows[task]["smallest_p"] == 1 / 1000
        assert rows[task]["verdict"] == "higher"
    assert rows["Clu"]["p"] is None
    assert rows["Clu"]["verdict"] == "not tested: no per-item results of b"
    values = (kept["b", 0, "ret"] + kept["b", 1, "ret"]) / 2 - kept["a", None, "ret"]
    assert rows["Ret"]["difference"] == pytest.approx(values.mean())
    assert compare([folder / "a", folder / "b"], permutations=999).datasets == found.datasets
    assert "1 of 3 rows" in str(found)
    no_nan(found)


def test_sts_items_agree_with_swapping_and_ranking(with_items):
    folder, kept = with_items
    write(folder / "one.csv", [row for row in read(folder / "b") if row.seed == 0])
    for name in ("sts-0.npz", "ret-0.npz"):
        (folder / name).write_bytes((folder / "b" / name).read_bytes())
    # Against a third model whose STS predictions are near b's, so that p is in the middle.
    near = kept["b", 0] + 0.25 * np.random.default_rng(9).standard_normal(120)
    write_items(folder / "c" / "sts.npz", [f"q{i}" for i in range(120)], prediction=near, gold=kept["gold"])
    score = float(stats.spearmanr(near, kept["gold"])[0])
    append(folder / "c" / "results.csv", [Score("c", "STSX", "STS", score, items="sts.npz")])
    row = compare([folder / "one.csv", folder / "c"], permutations=4999).datasets[0]

    random = np.random.default_rng(0)
    a, b = stats.rankdata(near), stats.rankdata(kept["b", 0])
    flips = random.random((3000, 120)) < 0.5
    swapped = [np.where(flips, a, b), np.where(flips, b, a)]
    gold = stats.rankdata(kept["gold"])
    first, second = (np.array([np.corrcoef(r, gold)[0, 1] for r in stats.rankdata(x, axis=1)]) for x in swapped)
    observed = score - stats.spearmanr(kept["b", 0], kept["gold"])[0]
    assert row["p"] == pytest.approx((abs(first - second) >= abs(observed)).mean(), abs=0.04)
    assert 0.05 < row["p"] < 0.95


def test_few_permutations_are_named(with_items):
    folder, _ = with_items
    found = compare([folder / "a", folder / "b"], permutations=9)
    verdicts = {row["task"]: row["verdict"] for row in found.datasets}
    assert verdicts["Ret"].startswith("too few permutations: smallest reachable p = 0.1")


def test_items_that_do_not_give_the_score(with_items):
    folder, _ = with_items
    rows = [row for row in read(folder / "b") if row.task == "Ret"]
    write(folder / "b" / "results.csv", [Score("b", "Ret", "Retrieval", 0.1, items=rows[0].items)])
    found = compare([folder / "a", folder / "b"], permutations=9)
    assert re.match(r"not tested: the mean of its items is 0\.\d+, b's score 0.1000", found.datasets[0]["verdict"])


def test_item_files_that_are_missing_damaged_or_of_other_data(with_items):
    folder, kept = with_items
    file = folder / "b" / "ret-0.npz"
    whole = file.read_bytes()
    file.unlink()
    found = compare([folder / "a", folder / "b"], permutations=9)
    assert any("ret-0.npz does not exist" in row["verdict"] for row in found.datasets)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ret-0\.npz cannot be read, is it cut short"):
        compare([folder / "a", folder / "b"], permutations=9)
    file.write_bytes(whole)
    ids = [f"q{i}" for i in range(120)]
    write_items(folder / "b" / "sts-0.npz", ids, prediction=2 * kept["b", 0], gold=2 * kept["gold"])
    with pytest.raises(ValueError, match="differ in gold: not the same data set"):
        compare([folder / "a", folder / "b"], permutations=9)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"value": [1.0, 2.0]}, "shapes"),
        ({"value": [1.0, np.nan, 0.0]}, "no finite number"),
        ({"prediction": [1.0, 2.0, 3.0]}, "expected item and value, or item, prediction and gold"),
        ({"item": ["x", "y", "x"], "value": [1.0, 2.0, 3.0]}, "ids repeat"),
    ],
)
def test_per_item_files_are_checked_when_written(tmp_path, arrays, message):
    given = {"item": ["x", "y", "z"], **arrays}
    with pytest.raises(ValueError, match=message):
        write_items(tmp_path / "items.npz", given.pop("item"), **given)
    assert not list(tmp_path.iterdir())


def test_items_come_back(tmp_path):
    write_items(tmp_path / "a.npz", [3, 1], prediction=[0.5, 0.25], gold=[1, 0])
    found = read_items(tmp_path / "a.npz")
    assert found.ids.tolist() == [3, 1]
    assert found.values.tolist() == [0.5, 0.25]
    assert found.gold is not None
    assert found.gold.tolist() == [1, 0]


# --- the tidy CSV -----------------------------------------------------------------------------------------------------


def test_rows_come_back_and_replace_their_older_selves(tmp_path):
    path = tmp_path / "new" / "results.csv"
    first = Score("m, with comma", "STS12", "STS", 0.1 + 0.2, "id", "eos-causal", 3, "test", "cosine_spearman", 100,
                  "items/x.npz", 1.5, 200.0, "mlpool 0.1", "2025-01-01T00:00:00")  # fmt: skip
    append(path, [first, Score("n", "STS12", "STS", -0.25)])
    assert read(path)[0] == first  # every digit
    again = Score("n", "STS12", "STS", 0.5)
    append(path, [again])
    assert read(path) == [first, again]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == ["results.csv"]


def _append_some(path, name):
    for i in range(15):
        append(path, [Score(name, f"task{i}", "STS", 0.5)])


def test_processes_append_together(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_some, args=(tmp_path / "results.csv", name)) for name in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read(tmp_path)) == 45


GOOD = "model,task,task_type,score"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: empty"),
        (f"{GOOD},modle\n", r"line 1: unknown column 'modle' \(did you mean 'model'\?\)"),
        ("model,task,score\n", "line 1: missing column 'task_type'"),
        (f"{GOOD},score\n", "line 1: column 'score' twice"),
        (f"{GOOD}\na,b,STS\n", "line 2: 3 cells, expected 4"),
        (f"{GOOD}\na,b,STS,0.5\na,c,STS,high\n", "line 3: score is 'high', expected a number"),
        (f"{GOOD}\na,b,STS,83.2\n", r"line 2: score is 83.2, .*percent"),
        (f"{GOOD}\na,b,STS,nan\n", "line 2: score is nan"),
        (f"{GOOD}\na,b,STS,\n", "line 2: score is empty"),
        (f"{GOOD},seed\na,b,STS,0.5,one\n", "line 2: seed is 'one', expected an integer"),
        (f'{GOOD}\na,"b"x,STS,0.5\n', "line 2: not a CSV row"),
        (f"{GOOD}\na,b,STS,0.5\nü,b,STS,0.5\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_malformed_csv_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        compare([path])


def test_a_spreadsheets_csv_is_read(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_bytes(f"\ufeff{GOOD}\r\na,x,STS,0.5\r\n\r\nb,x,STS,0.6\r\n".encode())
    assert compare(path).table[0]["model"] == "b"


def test_a_missing_file_says_what_is_there(tmp_path):
    (tmp_path / "mine.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"results\.csv does not exist.*there is mine\.csv"):
        compare([tmp_path])


# --- output -----------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(tmp_path, capsys):
    rows = pair([0.01 * (i + 1) for i in range(10)]) + scores("c | d", {"R1": 0.2, **dict.fromkeys(STS[:10], 0.5)})
    write(tmp_path / "scores.csv", rows)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "out"
    assert run(parser.parse_args([str(tmp_path / "scores.csv"), "--datasets", "-o", str(out)])) is None
    printed = capsys.readouterr()
    assert "b compared with a" in printed.out
    assert "c | d compared with a" in printed.out
    assert "STS9" in printed.out
    assert "forest.png" in printed.err
    assert sorted(p.name for p in out.iterdir()) == ["comparison.csv", "comparison.md", "forest.png", "per_dataset.csv"]
    assert (out / "forest.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    assert [row["verdict"] for row in table] == ["higher", "no difference"]
    tables = [line for line in (out / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables[:4]}) == 1  # the bar in a name is escaped
    assert len(list(csv.DictReader((out / "per_dataset.csv").open()))) == 20


def test_senseless_options():
    for options in ({"alpha": 0}, {"alpha": 1.5}, {"permutations": 0}):
        with pytest.raises(ValueError, match="expected 0 < alpha < 1"):
            compare(pair([0.1] * 6), **options)


@pytest.mark.parametrize("name", ["../outside.npz", "/etc/passwd", "a/../../outside.npz"])
def test_items_outside_the_folder_of_their_table_are_not_opened(tmp_path, name):
    write_items(tmp_path / "outside.npz", range(9), value=range(9))
    (tmp_path / "inside").mkdir()
    for model in "ab":
        rows = [Score(model, task, "Retrieval", 0.5, metric="ndcg_at_10", items=name) for task in "stu"]
        write(tmp_path / f"inside/{model}.csv", rows)
    with pytest.raises(ValueError, match="expected a name inside"):
        compare([tmp_path / "inside/a.csv", tmp_path / "inside/b.csv"])
