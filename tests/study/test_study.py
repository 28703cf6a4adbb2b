"""`mlpool study` on a tiny random encoder: what it computes, what it refuses, and that it goes on where it stopped."""

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import sentence, tiny_model, write_jsonl
from scipy.stats import spearmanr

pytest.importorskip("mteb")
pytest_plugins = ["evaluation_fixtures"]

from mlpool.evaluation import results  # noqa: E402
from mlpool.evaluation.local import local_tasks  # noqa: E402
from mlpool.evaluation.statistics import mean_interval  # noqa: E402
from mlpool.study import choose, page, read_study, report, runs, study  # noqa: E402
from mlpool.study.made import TASKS, TRAIN, write_data  # noqa: E402
from mlpool.study.parameters import count, match_parameters  # noqa: E402
from mlpool.study.tables import Line  # noqa: E402

SMALL = {"num_latents": 4, "num_heads": 2, "head_dim": 8}
FROM_MEAN = {**SMALL, "start": "last"}
MULTI = {"name": "multi-layer-bidirectional", "label": "multi", "pooler": FROM_MEAN}


@pytest.fixture(scope="module")
def config(tiny_folder: Path, small_data: Path) -> Callable[..., dict[str, Any]]:
    rng = random.Random(1)
    write_jsonl(
        small_data / "pairs/train.jsonl", ({"query": sentence(rng), "positive": sentence(rng)} for _ in range(64))
    )

    def make(output: Path, **changes: Any) -> dict[str, Any]:
        train = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "learning_rate": 1e-3}
        return {
            "base": str(tiny_folder), "data_dir": str(small_data), "output": str(output),
            "data": {"train": "pairs/train.jsonl"}, "train": train,
            "designs": ["mean-bidirectional", MULTI], "seeds": [0, 1],
            "evaluate": {"tasks": ["sts/made", "retrieval/made"]}, **changes,
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def done(config: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished study with a search; its config."""
    search = {"grid": {"pooler_learning_rate": ["1e-3", 0.5]}, "max_steps": 1, "tasks": ["sts/made"]}
    values = config(tmp_path_factory.mktemp("study") / "out", search=search)
    study(values, estimate=False)
    return values


def rows_of(values: dict[str, Any]) -> list[results.Score]:
    return results.read(values["output"])


def test_every_design_seed_and_task_has_a_score(done: dict) -> None:
    rows = rows_of(done)
    trained = {(r.model, r.seed, r.task) for r in rows if "untrained" not in r.model}
    assert trained == {
        (m, s, t) for m in ("mean-bidirectional", "multi") for s in (0, 1) for t in ("sts/made", "retrieval/made")
    }
    assert {(r.model, r.seed) for r in rows} - {r[:2] for r in trained} == {
        ("mean-bidirectional (untrained)", 0), ("multi (untrained)", 0),
    }  # fmt: skip
    assert all(r.items_path and r.items_path.is_file() for r in rows)
    assert len({r.score for r in rows if r.model == "multi" and r.task == "sts/made"}) == 2, "seeds train alike"


def test_untrained_scores_are_those_of_plain_mean_pooling(done: dict, tiny_folder: Path) -> None:
    pairs = [json.loads(line) for line in (Path(done["data_dir"]) / "sts/made/test.jsonl").read_text().splitlines()]
    a, b = (tiny_model(tiny_folder).encode([pair[k] for pair in pairs]) for k in ("sentence1", "sentence2"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = spearmanr(cosine, [pair["score"] for pair in pairs]).statistic
    found = {r.model: r.score for r in rows_of(done) if r.task == "sts/made" and "untrained" in r.model}
    # The residual pool starts at mean pooling, so both are.
    assert found == pytest.approx(dict.fromkeys(found, expected), abs=1e-4)


def test_a_run_is_what_mlpool_train_gives(done: dict, tmp_path: Path) -> None:
    from transformers import set_seed

    from mlpool.evaluation.evaluate import evaluate_local
    from mlpool.training.train import train

    set_seed(1)
    embedder = train({
        "model": done["base"], "design": "multi-layer-bidirectional", "pooler": FROM_MEAN, **done["train"], "seed": 1,
        "data": str(Path(done["data_dir"]) / "pairs/train.jsonl"), "save_strategy": "no", "output_dir": str(tmp_path),
        "pooler_learning_rate": recipe_of(done)["residual pool"]["pooler_learning_rate"],
    })  # fmt: skip
    expected = evaluate_local(embedder, done["data_dir"], ["sts/made"], label="x", progress=False)[0].score
    (found,) = (r.score for r in rows_of(done) if (r.model, r.seed, r.task) == ("multi", 1, "sts/made"))
    assert found == pytest.approx(expected, abs=1e-4)


def recipe_of(values: dict) -> dict[str, dict]:
    found = json.loads((Path(values["output"]) / "recipe.json").read_text())
    return {group: one["recipe"] for group, one in found.items()}


def test_the_recipe_with_the_best_development_score_is_used(done: dict) -> None:
    output = Path(done["output"])
    scores = {}
    for path in output.glob("search/multi/*/evaluation/results.csv"):
        (row,) = csv.DictReader(path.open())
        assert row["split"] == "dev"
        scores[float(path.parts[-3].partition("=")[2])] = float(row["score"])
    assert sorted(scores) == [0.001, 0.5]
    best = max(scores, key=scores.__getitem__)
    assert recipe_of(done)["residual pool"] == {"pooler_learning_rate": best}
    trained = json.loads((output / "runs/multi/seed-1/config.json").read_text())["train"]
    assert trained["pooler_learning_rate"] == best
    assert trained["max_steps"] == 2
    # There is no pool to give a learning rate: one run, and none in the training.
    assert len(list(output.glob("search/mean-bidirectional/**/run.json"))) == 1
    assert "pooler_learning_rate" not in (output / "runs/mean-bidirectional/seed-0/config.json").read_text()


def test_what_is_finished_is_not_done_again_and_what_is_not_is(done: dict, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done["output"], output)
    before = {r.key: r.score for r in rows_of(done)}
    unfinished = output / "runs/multi/seed-1"
    (unfinished / "run.json").unlink()
    (unfinished / "evaluation/results.csv").write_text("cut sh")  # as a kill leaves it
    times = {path: path.stat().st_mtime_ns for path in output.rglob("run.json")}
    study({**done, "output": str(output)}, estimate=False)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {r.key: r.score for r in results.read(output)} == pytest.approx(before)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train", {"max_steps": 3}, "max_steps was 2, is 3"),
        ("evaluate", {"tasks": ["sts/made"]}, "evaluate.tasks was"),
        (
            "designs",
            ["mean-bidirectional", {**MULTI, "pooler": {**SMALL, "num_latents": 5}}],
            "num_latents was 4, is 5",
        ),
    ],
)
def test_a_changed_config_is_refused_with_what_changed(done: dict, key: str, value: Any, said: str) -> None:
    new = {**done[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=said):
        study({**done, key: new, "search": None}, estimate=False)


def test_a_changed_base_is_refused(done: dict, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(done["base"], base)
    with pytest.raises(ValueError, match=r"train\.model was"):
        study({**done, "base": str(base)}, estimate=False)


def test_force_starts_in_a_new_folder(done: dict) -> None:
    found = study({**done, "train": {**done["train"], "max_steps": 5}}, force=True, dry_run=True, estimate=False)
    assert found == Path(done["output"] + "-2")
    assert not found.exists()


def test_dry_run_prints_the_plan_with_seconds_and_trains_nothing(
    config: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = study(config(tmp_path / "out", designs=[MULTI]), dry_run=True)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("multi")).split()
    assert line[:3] == ["multi", "3", "0"]
    assert line[-3] == "2"
    assert float(line[-2]) > 0
    assert "to do     4 steps" in said
    assert re.search(r"about [\d.]+ (s|min|h) with 1 at a time", said)
    assert [path.name for path in output.iterdir()] == ["probe.json"]


def test_a_run_that_fails_is_named_and_the_others_are_done(config: Callable[..., dict], tmp_path: Path) -> None:
    designs = ["mean-bidirectional", {**MULTI, "layers": [7]}]
    values = config(tmp_path, designs=designs, seeds=[0], untrained=False)
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed.*runs/multi/seed-0: ValueError: layers must name"):
        study(values, estimate=False)
    assert {r.model for r in rows_of(values)} == {"mean-bidirectional"}


# --- the report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Texts of table cells by row, and what the page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.loads: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell, self._kind = [], values.get("class") or ""

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append(("".join(self._cell).strip(), self._kind))
            self._cell = None


def test_the_report_says_what_the_scores_are_and_loads_nothing(done: dict) -> None:
    text = (Path(done["output"]) / "report.html").read_text()
    shown_page = Page(text)
    assert shown_page.loads == []
    assert not re.search(r"@import|url\(|<link|fetch\(|import\(|XMLHttp", text)
    assert len(text) < 200_000
    header = next(row for row in shown_page.rows if row[0][0] == "design")
    assert [cell for cell, _ in header] == ["design", "mean", "sts/made", "retrieval/made"]  # no mean of one task
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows_of(done):
        scores.setdefault(row.model, {}).setdefault(row.task, []).append(row.score)
    for label, shown in (("mean-bidirectional", "mean-bidirectional (baseline)"), ("multi", "multi")):
        cells = next(row for row in shown_page.rows if row and row[0][0] == shown)
        both = np.array([scores[label]["sts/made"], scores[label]["retrieval/made"]])
        for (cell, _), values in zip(cells[1:], [both.mean(0), *both], strict=True):
            assert cell.endswith(f"{values.mean():.4f} ± {values.std(ddof=1):.4f}")
    for column in range(1, 4):
        lines = [row for row in shown_page.rows if row and row[0][0] in ("mean-bidirectional (baseline)", "multi")][:2]
        best = max(lines, key=lambda row: float(re.search(r"\d\.\d{4}", row[column][0])[0]))
        assert "best" in best[column][1]


def test_what_a_user_names_is_text_and_never_markup(done: dict) -> None:
    found = report.gather(read_study(done), recipe_of(done))
    found.study.title = "<script>alert(1)</script>"
    text = page.page(found, "mlpool study '<b>'")
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;" in text


def test_marks_stand_only_where_a_difference_is_shown(done: dict) -> None:
    output = Path(done["output"])
    found = report.gather(read_study(done), recipe_of(done))
    assert found.comparison is not None
    for row in found.comparison.datasets:
        row["verdict"] = "higher" if row["task"] == "sts/made" else "n too small: smallest reachable p = 0.5"
    line = next(line for line in report.summary(found).splitlines() if line.startswith("| multi |"))
    assert ["▲" in cell for cell in line.split("|")[2:5]] == [False, True, False]
    assert "higher" not in report.headline(found).split("Item by item")[0]
    assert (output / "comparison/comparison.md").is_file()


def test_a_cell_tells_seeds_interval_difference_and_test(done: dict) -> None:
    found = report.gather(read_study(done), recipe_of(done))
    (table,) = page._scores(found, [("multi", "multi")], "")
    told = dict(zip(table.header[1:], (cell.told.split("\n") for cell in table.rows[0].cells), strict=True))
    mine, theirs = (np.array(found.scores[label]["sts/made"]) for label in ("multi", "mean-bidirectional"))
    low, high = mean_interval(mine - theirs) or (0, 0)
    assert told["sts/made"][:2] == ["multi, sts/made", f"score {mine.mean():.4f}"]
    assert told["sts/made"][2].startswith(f"by seed {mine[0]:.4f}, {mine[1]:.4f}")
    within = f"; mean within {low:+.4f} to {high:+.4f} (95 %, 2 seeds)" if low < high else ""
    assert told["sts/made"][3] == f"{(mine - theirs).mean():+.4f} to the baseline{within}"
    assert told["sts/made"][4].startswith("over 60 items p = ")
    assert len(told["mean"]) == 4  # a mean over data sets has no items

    one, both = found.seeds["multi"], found.differences("multi", found.tasks)
    found.seeds["multi"] = [one[0], 7]  # a seed that the baseline has not is no difference to it
    assert found.differences("multi", found.tasks) == both[:1]


def test_many_tasks_have_a_table_for_each_type_and_one_of_means(done: dict) -> None:
    found = report.gather(read_study(done), recipe_of(done))
    names = {kind: [f"{kind}/{i}" for i in range(8)] for kind in found.groups}
    for of_label in found.scores.values():
        for (_, tasks), values in zip(names.items(), list(of_label.values()), strict=True):
            of_label.update(dict.fromkeys(tasks, values))
    found.groups = names
    shown = Page(page.page(found, "mlpool study"))
    headers = [[cell for cell, _ in row] for row in shown.rows if row[0][0] == "design"][:3]
    assert headers == [["design", "mean", *(f"mean of {kind}" for kind in names)]] + [
        ["design", *tasks] for tasks in names.values()
    ]


def test_a_line_stays_on_its_scale() -> None:
    drawn = Line.on((-1.0, 1.0), 0.5, 0.0, (-3.0, 0.75), dots=[-1.0, 2.0])
    assert (drawn.at, drawn.zero, drawn.interval, drawn.cut, drawn.dots) == (150, 100, (0, 175), ["low"], [0, 200])


def test_the_profile_of_a_pool_is_a_distribution_over_its_layers(done: dict) -> None:
    note = json.loads((Path(done["output"]) / "runs/multi/seed-0/run.json").read_text())
    assert note["profile"]["layers"] == [1, 2]
    assert sum(note["profile"]["shares"]) == pytest.approx(1, abs=1e-3)
    counts = note["parameters"]
    assert counts["pool"] == sum(p.numel() for p in _pool(done).parameters())
    assert counts["trainable"] <= counts["total"]
    assert note["texts_per_second"] > 0


def _pool(values: dict) -> Any:
    from mlpool.pooling import MultiLayerPool

    return MultiLayerPool.from_pretrained(Path(values["output"]) / "runs/multi/seed-0/model/1_Pooler")


def test_no_model_is_kept_unless_asked(done: dict) -> None:
    model = Path(done["output"]) / "runs/multi/seed-0/model"
    assert not list(model.glob("model*.safetensors"))
    assert not (model.parent / "train").exists()


# --- parameter-matched controls ---------------------------------------------------------------------------------------


def test_a_lora_rank_is_found_that_trains_as_many_parameters(config: Callable[..., dict], tmp_path: Path) -> None:
    values = config(tmp_path, match_parameters=True)
    values["train"] |= {"lora": {"rank": 2, "alpha": 4, "target_modules": ["query", "value"]}}
    found = read_study(values)
    (said,) = match_parameters(found)
    mean, multi = found.entries
    assert multi.train["lora"]["rank"] == 2
    assert mean.train["lora"]["alpha"] == 2 * mean.train["lora"]["rank"]
    assert abs(count(mean) - count(multi)) <= 0.05 * count(multi)
    assert f"{count(mean):,}" in said


def test_a_pool_is_sized_to_match(config: Callable[..., dict], tmp_path: Path) -> None:
    wide = {**SMALL, "num_heads": 6, "head_dim": 64}
    other = {"name": "last-layer-bidirectional", "pooler": {**wide, "num_heads": 1}, "match": "multi"}
    found = read_study(config(tmp_path, designs=[{**MULTI, "pooler": wide}, other]))
    match_parameters(found)
    assert found.entries[1].train["pooler"] == wide


def test_without_anything_to_size_matching_is_refused(config: Callable[..., dict], tmp_path: Path) -> None:
    wide = {**MULTI, "pooler": {**SMALL, "ff_mult": 16}}
    with pytest.raises(ValueError, match="trains all weights and has no pool to size"):
        match_parameters(read_study(config(tmp_path, designs=["mean-bidirectional", wide], match_parameters=True)))


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"desings": []}, "'desings'.*designs"),
        ({"designs": ["mean-bidirectional", "mean-bidirectional"]}, "called mean-bidirectional; give each"),
        ({"designs": ["mean"]}, "no design 'mean'"),
        ({"designs": [{"name": 5, "poller": {}}]}, "'poller'.*pooler"),
        ({"baseline": "mult"}, "'mult'; nearest: multi"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"search": {"grid": {"learning_rate": [1e-3]}, "split": "test"}}, "chosen on development data"),
        ({"search": {"grid": {"learning_rate": 1e-3}}}, r"search\.grid\.learning_rate is 0\.001, expected a list"),
        ({"base": None}, "--base"),
        ({"data_dir": None}, "--data"),
    ],
)
def test_a_wrong_config_is_an_error_that_helps(
    config: Callable[..., dict], tmp_path: Path, changes: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read_study(config(tmp_path, **changes))


def test_a_base_without_a_model_is_an_error_before_anything_starts(config: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: expected config\.json, found nothing"):
        read_study(config(tmp_path / "out", base=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_study(config(tmp_path / "out", base=str(tmp_path / "decodre")))


def test_overrides_reach_inside(config: Callable[..., dict], tmp_path: Path) -> None:
    found = read_study(config(tmp_path), ["train.learning_rate=1e-5", "seeds=[3]"], output=tmp_path / "other")
    assert found.seeds == [3]
    assert found.entries[0].train["learning_rate"] == 1e-5
    assert found.output == tmp_path / "other"


def test_recipes_are_searched_per_family_design_or_for_all(config: Callable[..., dict], tmp_path: Path) -> None:
    designs = ["mean-bidirectional", MULTI, {**MULTI, "label": "released", "pooler": {**SMALL, "residual": False}}]
    designs.append({"name": "last-layer-bidirectional", "pooler": SMALL})

    def searched(per: str) -> dict[str, list[str]]:
        search = {"grid": {"learning_rate": [1.0]}, "per": per}
        found = read_study(config(tmp_path, designs=designs, search=search))
        return {group: [entry.label for entry in members] for group, members in found.searched().items()}

    families = {"no trainable pool": ["mean-bidirectional"], "residual pool": ["multi"]}
    families["released equations"] = ["released"]
    assert searched("family") == families
    assert searched("shared") == {"shared": ["mean-bidirectional", "multi", "released"]}
    assert len(searched("design")) == 4


# --- many processes ---------------------------------------------------------------------------------------------------


def test_processes_share_the_runs_and_wait_for_each_other(
    config: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in turn, with runs that only mark themselves done; the second one looks when the first has finished."""
    todo = read_study(config(tmp_path, untrained=False)).runs()
    did: dict[str, list[str]] = {}
    waited: list[float] = []

    def mark(done: list[runs.Run]) -> None:
        for run in done:
            (tmp_path / run.folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / run.folder / runs.DONE).write_text(json.dumps({"hash": run.hash}))

    def pretend(mine: list[runs.Run], *_: Any) -> Any:
        mark(mine)
        did[rank] = [str(run.folder) for run in mine]
        yield from ((run, 0) for run in mine)

    def wait(seconds: float) -> None:
        waited.append(seconds)
        mark(todo)

    monkeypatch.setattr(runs, "_processes", pretend)
    monkeypatch.setattr(runs, "_write_results", lambda *_: None)
    monkeypatch.setattr(runs.time, "sleep", wait)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        runs.run_all(todo, tmp_path, 1, False, "study")
        if rank == "0":
            assert waited, "did not wait for the other process"
            for run in todo[1::2]:
                (tmp_path / run.folder / runs.DONE).unlink()
    assert sorted(did["0"] + did["1"]) == sorted(str(run.folder) for run in todo)
    assert len(did["0"]) == len(did["1"]) == 2
    with pytest.raises(ValueError, match="must agree on a folder"):
        study(config(tmp_path), force=True, dry_run=True, estimate=False)


def test_a_run_has_one_gpu_and_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    runs.own_device(slot=1, jobs=2)
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)


# --- the data that is made here ---------------------------------------------------------------------------------------


def test_made_data_is_whole_repeatable_and_does_not_leak(tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    for task in local_tasks(first, TASKS):
        task.load_data()
    texts = [json.loads(line) for line in (first / TRAIN).read_text().splitlines()]
    trained = {value for row in texts for value in row.values()}
    held_out = [json.loads(line) for line in (first / "retrieval/made/corpus.jsonl").read_text().splitlines()]
    assert not trained & {row["text"] for row in held_out}
    assert len((first / "text/train.jsonl").read_text().split()) > 100_000


def test_choose_needs_a_finished_search(config: Callable[..., dict], tmp_path: Path) -> None:
    search = {"grid": {"learning_rate": [1e-3]}, "tasks": ["sts/made"]}
    with pytest.raises(ValueError, match="2 runs are missing"):
        choose(read_study(config(tmp_path, search=search)))
