"""mteb's own tasks: each type as mteb scores it, by name, and the instructions before their texts."""

from collections import Counter

import pytest

pytest.importorskip("mteb", reason="needs mteb: pip install 'mlpool[eval]'")

from made import Calls

from mlpool.evaluation import results
from mlpool.evaluation.encoder import BARE, Prompts
from mlpool.evaluation.evaluate import evaluate, evaluate_local
from mlpool.evaluation.tasks import PAPER, mteb_tasks

pytest_plugins = ["evaluation_fixtures"]
INSTRUCT = "Instruct: {instruction}\nQuery: "


@pytest.mark.filterwarnings("ignore")  # mteb's own wrapper's
def test_every_type_of_the_paper(tiny, small_mteb, tmp_path, no_network):
    """Scores are mteb's own for the same model and prompts; items give the score wherever it is a mean of items."""
    import mteb

    calls = Calls(tiny)
    found = evaluate(tiny, list(small_mteb), tmp_path, label="m", progress=False)
    assert {row.task: row.task_type for row in found} == small_mteb
    assert set(small_mteb.values()) == set(PAPER)
    assert results.read(tmp_path) == found
    with_items = {row.task for row in found if row.items}
    assert with_items == set(small_mteb) - {
        "TwitterURLCorpus", "ArxivClusteringP2P", "TwentyNewsgroupsClustering.v2", "SummEval"
    }  # fmt: skip
    assert {path.name.removesuffix("_predictions.json") for path in tmp_path.glob("predictions/*/*/*")} == (
        set(small_mteb) - with_items
    )
    for row in found:
        if row.items and (items := results.read_items(tmp_path / row.items)).gold is None:
            assert items.values.mean() == pytest.approx(row.score, abs=1e-5), row.task
    tiny.encode = calls.encode
    for row, task in zip(found, mteb_tasks(small_mteb), strict=True):
        # mteb's own wrapper, given the same prompts as prompts of the model
        prompts = Prompts("mteb")
        kinds = ("query", "document") if row.task_type in ("Retrieval", "Reranking") else (None,)
        tiny.prompts = {
            task.metadata.name + (f"-{kind}" if kind else ""): prompts.of(task.metadata, kind, tiny) for kind in kinds
        }
        theirs = mteb.evaluate(tiny, task, cache=None).task_results[0].get_score()
        assert row.score == pytest.approx(theirs, abs=1e-6), row.task


def test_instructions(tiny, small_mteb):
    """Bare before every text, in retrieval and reranking before queries only."""
    calls = Calls(tiny)
    evaluate(tiny, ["NFCorpus"], label="m", progress=False)
    assert set(calls.prompts.values()) == {
        "", "Given a question, retrieve relevant documents that best answer the question "
    }  # fmt: skip
    assert Counter(calls.prompts.values())[""] == 40
    for name, prompt in (
        ("Banking77Classification", "Given a online banking query, find the corresponding intents "),
        ("STSBenchmark", "Retrieve semantically similar text. "),
    ):
        calls.prompts.clear()
        evaluate(tiny, [name], label="m", progress=False)
        assert set(calls.prompts.values()) == {prompt}


def test_prompts(tiny):
    sts, banking, nf = (task.metadata for task in mteb_tasks(["STS12", "Banking77Classification", "NFCorpus"]))
    instruct = Prompts("mteb", INSTRUCT)
    assert instruct.of(banking, None, tiny) == (
        "Instruct: Given a online banking query, find the corresponding intents\nQuery: "
    )
    assert instruct.of(nf, "document", tiny) == Prompts("none").of(nf, "query", tiny) == ""
    own = Prompts({"STS12": "A", "Classification": "B", "default": "C"}, BARE)
    assert [own.of(m, None, tiny) for m in (sts, banking)] == ["A ", "B "]
    assert (own.of(nf, "query", tiny), own.of(nf, "document", tiny)) == ("C ", "")
    assert Prompts({"default": ""}).of(sts, None, tiny) == ""
    stored = Prompts("model")
    tiny.prompts = {}
    assert stored.of(nf, "query", tiny) is stored.of(sts, None, tiny) is None  # the model's default, whatever it is
    tiny.prompts = {"query": "Q: ", "document": "D: ", "STS": "S: ", "NFCorpus-query": "N: "}
    assert [stored.of(nf, k, tiny) for k in ("query", "document")] == ["N: ", "D: "]
    assert (stored.of(sts, None, tiny), stored.of(banking, None, tiny)) == ("S: ", None)


def test_prompts_exactly_as_the_papers_code(tiny, tmp_path):
    """No space behind the instruction, documents too in reranking, its wording where a file has it."""
    names = ["STS12", "NFCorpus", "AskUbuntuDupQuestions"]
    sts, retrieval, reranking = (task.metadata for task in mteb_tasks(names))
    ours, exact = Prompts("mteb"), Prompts.load("paper-exact")
    exact.check(mteb_tasks(names))
    for metadata, kind in ((sts, None), (retrieval, "query"), (reranking, "query")):
        prompt = exact.of(metadata, kind, tiny)
        assert prompt + " " == ours.of(metadata, kind, tiny)
    assert exact.of(reranking, "document", tiny) == prompt
    assert ours.of(reranking, "document", tiny) == exact.of(retrieval, "document", tiny) == ""
    (tmp_path / "w.json").write_text('{"STS12": "Theirs."}')
    worded = Prompts.load(f"paper-exact={tmp_path / 'w.json'}")
    worded.check(mteb_tasks(names))  # what the file does not have is mteb's
    assert worded.of(sts, None, tiny) == "Theirs."
    assert worded.of(reranking, "document", tiny) == prompt
    policies = [Prompts("mteb", "{instruction}").policy, exact.policy, worded.policy]
    assert all(policies.count(policy) == 1 for policy in policies)  # none is taken for another's results
    with pytest.raises(ValueError, match="paper-exact is without a template"):
        Prompts.load("paper-exact", INSTRUCT)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        Prompts.load(f"paper-exact={tmp_path / 'none.json'}")


def test_no_prompt_beats_a_default_one(tiny, small_data):
    """ "none" also switches the model's default prompt off."""
    (bare,) = evaluate_local(tiny, small_data, ["sts"], label="m", progress=False)
    tiny.prompts, tiny.default_prompt_name = {"x": "drug gene heart "}, "x"
    (own,) = evaluate_local(tiny, small_data, ["sts"], label="m", progress=False)
    (none,) = evaluate_local(tiny, small_data, ["sts"], label="m", prompts=Prompts("none"), progress=False)
    assert none.score == bare.score != own.score


@pytest.mark.parametrize(("name", "text"), [("p.json", '{"STS": "find"}'), ("p.yaml", "STS: find\n")])
def test_prompt_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    prompts = Prompts.load(str(tmp_path / name))
    prompts.check(mteb_tasks(["STS12"]))
    with pytest.raises(ValueError, match="no instruction for SciFact; add the names, a type of tasks"):
        prompts.check(mteb_tasks(["STS12", "SciFact"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[1]", "must map names"), ('{"a": 1}', "must map names")],
)
def test_wrong_prompt_files(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Prompts.load(str(tmp_path / "p.json"))


def test_wrong_prompts(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"mteb, model, none, paper-exact or a file; there is no file .*x\.json"
    ):
        Prompts.load(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=r"must contain \{instruction\}"):
        Prompts("mteb", "Instruct: ")
    with pytest.raises(ValueError, match="must be 'mteb', 'model', 'none' or a mapping, got 'mtab'"):
        Prompts("mtab")


def test_prompt_policies_never_share_a_score(tiny, small_data, tmp_path):
    policies = [Prompts("none"), Prompts("mteb"), Prompts("mteb", INSTRUCT), Prompts({"STS": "drug"}), Prompts("model")]
    found = [
        evaluate_local(tiny, small_data, ["sts"], tmp_path, label="m", prompts=p, progress=False)[0] for p in policies
    ]
    assert len({row.identity for row in found}) == len(policies)
    assert found[0].score == found[4].score != found[3].score  # this model stores no prompts


# --- names ---------------------------------------------------------------------------------------------------------


def test_the_papers_tasks():
    tasks = mteb_tasks("paper")
    assert len(tasks) == len({task.metadata.name for task in tasks}) == 47
    assert Counter(task.metadata.type for task in tasks) == {kind: len(names) for kind, names in PAPER.items()}
    assert next(t for t in tasks if t.metadata.name == "MSMARCO").eval_splits == ["dev"]
    assert [t.metadata.name for t in mteb_tasks(["SummEval", "Summarization", "STS22.v2"])] == ["SummEval", "STS22.v2"]


def test_other_languages_are_left_out():
    (task,) = mteb_tasks(["STS22.v2"])
    assert task.hf_subsets == ["en"]


@pytest.mark.parametrize(
    ("name", "near"), [("STS1", "STS1[0-9]"), ("scifact", "nearest: SciFact"), ("Clusterings", "nearest: Clustering")]
)
def test_unknown_tasks(name, near):
    with pytest.raises(ValueError, match=f"no task '{name}' in mteb; .*{near}"):
        mteb_tasks(["STS12", name])


@pytest.mark.filterwarnings("ignore:The used Evaluator is deprecated")  # the paper's SummEval
def test_missing_data(tiny, small_mteb, tmp_path, monkeypatch):
    """Which, and how to get them; all other tasks are done and kept."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "none")
    with pytest.raises(FileNotFoundError) as error:
        evaluate(tiny, ["STS12", "STSBenchmark", "SciFact", "SummEval"], tmp_path, label="m", progress=False)
    message = str(error.value)
    assert "STS12 (mteb/sts12-sts: " in message
    assert "SciFact (mteb/scifact: " in message
    assert "[mteb.get_task(t).load_data() for t in ('STS12', 'SciFact',)]" in message
    assert "--local DIR" in message
    assert [row.task for row in results.read(tmp_path)] == ["STSBenchmark", "SummEval"]
