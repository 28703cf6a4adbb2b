"""Local folders: every metric against another library or brute force, and data that is broken."""

import json
import math
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mteb", reason="needs mteb: pip install 'mlpool[eval]'")

from made import WORDS, tiny_model, write_jsonl

from mlpool.evaluation.evaluate import evaluate_local
from mlpool.evaluation.local import local_tasks
from mlpool.evaluation.results import read_items

pytest_plugins = ["evaluation_fixtures"]
TASKS = ["sts/made", "retrieval/made", "classification/made", "clustering/made", "pair_classification/made"]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_model(tiny_folder)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def rows(model, small_data, output):
    return {row.task: row for row in evaluate_local(model, small_data, None, output, label="tiny", progress=False)}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def embed(model, texts: list[str]) -> np.ndarray:
    vectors = model.encode(texts).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pairs_of(path: Path, gold: str = "score") -> tuple[list[str], list[str], list[float]]:
    rows = read(path)
    return [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [r[gold] for r in rows]


# --- metrics -------------------------------------------------------------------------------------------------------


def test_everything_is_found(rows):
    assert sorted(rows) == sorted(TASKS)
    assert {row.task_type for row in rows.values()} == {
        "STS", "Retrieval", "Classification", "Clustering", "PairClassification"
    }  # fmt: skip
    assert {task: row.n_items for task, row in rows.items()} == {
        "sts/made": 60, "retrieval/made": 38, "classification/made": 75, "clustering/made": 75,
        "pair_classification/made": 60,
    }  # fmt: skip


def test_sts(rows, model, small_data, output):
    from scipy.stats import spearmanr
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    row = rows["sts/made"]
    first, second, gold = pairs_of(small_data / "sts/made/test.jsonl")
    cosine = (embed(model, first) * embed(model, second)).sum(1)
    assert row.score == pytest.approx(spearmanr(cosine, gold).statistic, abs=1e-9)
    theirs = EmbeddingSimilarityEvaluator(first, second, gold, main_similarity="cosine")(model)
    assert row.score == pytest.approx(theirs["spearman_cosine"], abs=1e-9)
    items = read_items(output / row.items)
    np.testing.assert_allclose(items.values, cosine, atol=1e-6)
    np.testing.assert_allclose(items.gold, gold)
    assert row.score == pytest.approx(spearmanr(items.values, items.gold).statistic, abs=1e-9)


def test_retrieval(rows, model, small_data, output):
    """nDCG@10 by hand, and by sentence-transformers, which counts relevance as 0 or 1."""
    folder = small_data / "retrieval/made"
    texts = {d["_id"]: f"{d['title']} {d['text']}".strip() for d in read(folder / "corpus.jsonl")}
    queries = {q["_id"]: q["text"] for q in read(folder / "queries.jsonl")}
    relevant: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        relevant.setdefault(query, {})[document] = int(score)
    similar = embed(model, [queries[q] for q in relevant]) @ embed(model, list(texts.values())).T
    by_hand = {}
    for query, scores in zip(relevant, similar, strict=True):
        best = [list(texts)[i] for i in np.argsort(-scores)[:10]]
        gain = sum(relevant[query].get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(best))
        ideal = sorted(relevant[query].values(), reverse=True)[:10]
        by_hand[query] = gain / sum(g / math.log2(rank + 2) for rank, g in enumerate(ideal))
    row = rows["retrieval/made"]
    assert row.score == pytest.approx(np.mean(list(by_hand.values())), abs=1e-5)  # mteb rounds to five digits
    items = read_items(output / row.items)
    assert dict(zip(items.ids, items.values, strict=True)) == pytest.approx(by_hand, abs=1e-9)


def test_retrieval_as_sentence_transformers(model, small_data, tmp_path):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    folder = tmp_path / "retrieval/binary"
    shutil.copytree(small_data / "retrieval/made", folder)
    relevant: dict[str, set[str]] = {f"q{i}": {f"d{i}", f"d{i + 40}"} for i in range(40)}
    (folder / "qrels.tsv").write_text("".join(f"{q}\t{d}\t1\n" for q, ids in relevant.items() for d in sorted(ids)))
    texts = {d["_id"]: f"{d['title']} {d['text']}".strip() for d in read(folder / "corpus.jsonl")}
    queries = {q["_id"]: q["text"] for q in read(folder / "queries.jsonl")}
    theirs = InformationRetrievalEvaluator(queries, texts, relevant, ndcg_at_k=[10], main_score_function="cosine")
    (row,) = evaluate_local(model, tmp_path, label="tiny", progress=False)
    assert row.score == pytest.approx(theirs(model)["cosine_ndcg@10"], abs=1e-5)


def test_classification(rows, model, small_data, output):
    """mteb's protocol anew: ten logistic regressions, each on 8 texts of each label."""
    from sklearn.linear_model import LogisticRegression

    train, test = (read(small_data / f"classification/made/{s}.jsonl") for s in ("train", "test"))
    vectors = {s: model.encode([r["text"] for r in rows]) for s, rows in (("train", train), ("test", test))}
    order, right = list(range(len(train))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)  # the same shuffle, of the order that the last one left
        chosen: list[int] = []
        for i in order:
            if sum(train[j]["label"] == train[i]["label"] for j in chosen) < 8:
                chosen.append(i)
        classifier = LogisticRegression(max_iter=100, random_state=42)
        classifier.fit(vectors["train"][chosen], [train[i]["label"] for i in chosen])
        right.append(classifier.predict(vectors["test"]) == np.array([r["label"] for r in test]))
    row = rows["classification/made"]
    assert row.score == pytest.approx(np.mean(right), abs=1e-12)
    np.testing.assert_allclose(read_items(output / row.items).values, np.mean(right, axis=0))


def test_clustering(rows, model, small_data, output):
    """V-measure of k-means on bootstrap samples, by scikit-learn alone."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    test = read(small_data / "classification/made/test.jsonl")
    vectors, labels = model.encode([r["text"] for r in test]), np.array([r["label"] for r in test])
    rng, scores = random.Random(42), []
    kmeans = MiniBatchKMeans(n_clusters=3, batch_size=512, init="k-means++", n_init=1, random_state=42)
    for _ in range(10):
        sample = rng.choices(range(len(test)), k=len(test))
        scores.append(v_measure_score(labels[sample], kmeans.fit_predict(vectors[sample])))
    row = rows["clustering/made"]
    assert row.score == pytest.approx(np.mean(scores), abs=1e-12)
    assert not row.items  # clusters are of the whole set
    (kept,) = output.glob("predictions/tiny/*/clustering-made_predictions.json")
    assert len(json.loads(kept.read_text())["default"]["test"]["Level 0"]) == 10


def test_pair_classification(rows, model, small_data):
    from sklearn.metrics import average_precision_score

    first, second, labels = pairs_of(small_data / "pair_classification/made/test.jsonl", "label")
    a, b = model.encode(first), model.encode(second)
    unit = embed(model, first), embed(model, second)
    similar = {
        "cosine": (unit[0] * unit[1]).sum(1), "dot": (a * b).sum(1), "euclidean": -np.linalg.norm(a - b, axis=1),
        "manhattan": -np.abs(a - b).sum(1),
    }  # fmt: skip
    best = max(average_precision_score(labels, values) for values in similar.values())
    assert rows["pair_classification/made"].score == pytest.approx(best, abs=1e-6)


def test_dev_split(model, small_data, tmp_path):
    """Its own row and items; mteb's file holds both splits."""
    from scipy.stats import spearmanr

    dev, test = (
        evaluate_local(model, small_data, ["sts/made"], tmp_path, label="tiny", split=split, progress=False)[0]
        for split in ("dev", "test")
    )
    first, second, gold = pairs_of(small_data / "sts/made/dev.jsonl")
    expected = spearmanr((embed(model, first) * embed(model, second)).sum(1), gold).statistic
    assert dev.score == pytest.approx(expected, abs=1e-9)
    assert dev.score != test.score
    assert dev.items != test.items
    (path,) = tmp_path.glob("results/tiny/*/sts-made.json")
    scores = json.loads(path.read_text())["scores"]
    assert {split: found[0]["main_score"] for split, found in scores.items()} == pytest.approx(
        {"dev": dev.score, "test": test.score}, abs=1e-6
    )


def test_qrels_folder(model, small_data, tmp_path):
    folder = Path(shutil.copytree(small_data / "retrieval/made", tmp_path / "retrieval/made"))
    (folder / "qrels").mkdir()
    shutil.move(folder / "qrels.tsv", folder / "qrels/dev.tsv")
    (row,) = evaluate_local(model, tmp_path, label="tiny", split="dev", progress=False)
    (expected,) = evaluate_local(model, small_data, ["retrieval/made"], label="tiny", progress=False)
    assert row.score == expected.score


def test_no_network_and_no_trace(tiny, small_data, no_network, monkeypatch):
    """Nothing connects, not even to look; the caller's random state, and what the model is, stay as they were."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    evaluate_local(tiny, small_data, label="tiny", progress=False)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_deterministic(rows, small_data, tiny):
    again = evaluate_local(tiny, small_data, label="tiny", progress=False)
    assert {row.task: row.score for row in again} == {task: row.score for task, row in rows.items()}


# --- names ---------------------------------------------------------------------------------------------------------


def names(tasks: list[Any]) -> list[str]:
    return [task.folder for task in tasks]


def test_names(small_data):
    """A folder of the kind that lacks the split is left out."""
    assert names(local_tasks(small_data, ["STS"])) == names(local_tasks(small_data, ["sts"])) == ["sts/made"]


def test_names_of_kinds_and_folders(small_data, tmp_path):
    shutil.copytree(small_data / "sts/made", tmp_path / "sts/one")
    shutil.copytree(small_data / "sts/made", tmp_path / "sts/two")
    assert names(local_tasks(tmp_path, ["two", "sts/one", "two"])) == ["sts/two", "sts/one"]
    assert names(local_tasks(tmp_path, ["STS"])) == names(local_tasks(tmp_path)) == ["sts/one", "sts/two"]


@pytest.mark.parametrize(
    ("tasks", "split", "error", "message"),
    [
        (["made"], "test", ValueError, "'made' is the name of several tasks: sts/made, retrieval/made"),
        (["sts/mode"], "test", ValueError, "no task 'sts/mode' among the local ones; nearest: sts/made"),
        (["xyzzy"], "test", ValueError, "nearest: sts/made, sts/train_only"),
        (["sts/train_only"], "test", FileNotFoundError, r"no .*test\.jsonl; .* holds train\.jsonl"),
        (["retrieval/made"], "dev", FileNotFoundError, r"no .*qrels/dev\.tsv"),
        (None, "train", ValueError, "split must be one of"),
    ],
)
def test_wrong_names(small_data, tasks, split, error, message):
    with pytest.raises(error, match=message):
        local_tasks(small_data, tasks, split)


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        local_tasks(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds none of the folders sts/NAME, retrieval/NAME"):
        local_tasks(tmp_path)
    write_jsonl(tmp_path / "sts/one/train.jsonl", [{}])
    with pytest.raises(FileNotFoundError, match=r"no task under .* has a test split; its tasks are sts/one"):
        local_tasks(tmp_path)


# --- broken data ---------------------------------------------------------------------------------------------------

GOOD = {
    "sts/x/test.jsonl": [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)],
    "pair_classification/x/test.jsonl": [{"sentence1": "a", "sentence2": "b", "label": i % 2} for i in range(3)],
    "classification/x/train.jsonl": [{"text": "a", "label": label} for label in "pqp"],
    "classification/x/test.jsonl": [{"text": "a", "label": label} for label in "pqp"],
    "retrieval/x/corpus.jsonl": [{"_id": f"d{i}", "title": "", "text": "a"} for i in range(3)],
    "retrieval/x/queries.jsonl": [{"_id": f"q{i}", "text": "a"} for i in range(3)],
    "retrieval/x/qrels.tsv": "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n",
}


@pytest.mark.parametrize(
    ("file", "line", "content", "message"),
    [
        ("sts/x/test.jsonl", 2, "{", "broken JSON"),
        pytest.param("sts/x/test.jsonl", 2, "[" * 100_000, "broken JSON: it is nested too deep", id="deep"),
        pytest.param("sts/x/test.jsonl", 2, f'{{"score": {"9" * 5000}}}', "broken JSON: Exceeds", id="long"),
        ("sts/x/test.jsonl", 2, '{"sentence1": "\\ud83d", "sentence2": "b", "score": 1}', "half a surrogate pair"),
        ("sts/x/test.jsonl", 2, '{"sentence1": "a", "sentence2": "b", "score": 1' + "0" * 400 + "}", "be a number"),
        ("classification/x/train.jsonl", 2, '{"text": "a", "label": "\\ud83d"}', "half a surrogate pair"),
        ("retrieval/x/qrels.tsv", 3, "q0\td0\t²", "expected query, document and a whole number"),
        ("sts/x/test.jsonl", 2, "[1]", "expected an object, got list"),
        ("sts/x/test.jsonl", 2, '{"sentence1": "a", "score": 1}', '"sentence2" is missing; found .sentence1., .score.'),
        ("sts/x/test.jsonl", 1, '{"sentence1": "a", "sentence2": 5, "score": 1}', "must be a string, got 5"),
        ("sts/x/test.jsonl", 3, '{"sentence1": "a", "sentence2": "b", "score": "1"}', "must be a number, got '1'"),
        ("sts/x/test.jsonl", 3, '{"sentence1": "a", "sentence2": "b", "score": NaN}', "must be a number, got nan"),
        ("pair_classification/x/test.jsonl", 2, '{"sentence1": "a", "sentence2": "b", "label": 2}', "0 or 1, got 2"),
        ("classification/x/test.jsonl", 2, '{"text": "a"}', '"label" is missing'),
        ("classification/x/test.jsonl", 2, '{"text": null, "label": "p"}', '"text" must be a string, got None'),
        ("classification/x/test.jsonl", 2, '{"text": "a", "label": "r"}', "label 'r' does not occur in .*train.jsonl"),
        ("classification/x/train.jsonl", 2, '{"text": "a", "label": 0.5}', "must be a string or integer, got 0.5"),
        ("retrieval/x/corpus.jsonl", 2, '{"text": "a"}', '"_id" is missing'),
        ("retrieval/x/corpus.jsonl", 2, '{"_id": "d0", "text": "a"}', "the id 'd0' occurs twice"),
        ("retrieval/x/queries.jsonl", 3, '{"_id": "q2"}', '"text" is missing'),
        ("retrieval/x/qrels.tsv", 2, "q9\td0\t1", "query 'q9' is not in .*queries.jsonl"),
        ("retrieval/x/qrels.tsv", 3, "q0\td9\t1", "document 'd9' is not in .*corpus.jsonl"),
        ("retrieval/x/qrels.tsv", 3, "q0 d0 1", "expected query, document and a whole number"),
        ("retrieval/x/qrels.tsv", 3, "q0\td0\t0.5", "expected query, document and a whole number"),
    ],
)  # fmt: skip
def test_broken_lines(tmp_path, file, line, content, message):
    """File and line are named."""
    write_all(tmp_path)
    lines = (tmp_path / file).read_text().splitlines()
    lines[line - 1] = content
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    kind = file.split("/")[0]
    with pytest.raises(ValueError, match=rf"{file}, line {line}:? .*{message}"):
        local_tasks(tmp_path, [f"{kind}/x"])[0].load_data()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sts/x/test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n', "holds 1 rows"),
        ("sts/x/test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n' * 3, "every score is 1.0"),
        ("pair_classification/x/test.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}\n' * 3, "every label"),
        ("classification/x/train.jsonl", '{"text": "a", "label": "p"}\n' * 3, "has a single label, 'p'"),
        ("classification/x/train.jsonl", "", "holds 0 rows"),
        ("retrieval/x/corpus.jsonl", "", "is empty"),
        ("retrieval/x/qrels.tsv", "q0\td0\t0\n", "names no relevant document"),
    ],
)  # fmt: skip
def test_useless_files(tmp_path, file, content, message):
    write_all(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}:? .*{message}"):
        local_tasks(tmp_path, [f"{file.split('/')[0]}/x"])[0].load_data()


def write_all(folder: Path) -> None:
    for name, content in GOOD.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            write_jsonl(folder / name, content)


def test_embeddings_all_alike(tiny, small_data, caplog):
    """No correlation is defined: 0, said, and no NaN in a table."""
    with torch.no_grad():
        for weight in tiny.parameters():
            weight.zero_()
        tiny[0].model.encoder.layer[1].output.LayerNorm.bias.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = evaluate_local(tiny, small_data, ["sts/made"], label="dead", progress=False)
    assert row.score == 0
    assert "cosine_spearman is undefined" in caplog.text


def test_embeddings_not_finite(tiny, small_data):
    with torch.no_grad():
        tiny[0].model.embeddings.word_embeddings.weight[4 + WORDS.index("card")] = float("nan")
    with pytest.raises(ValueError, match=r"broken embeds .* texts as NaN or infinity, the first: '.*card"):
        evaluate_local(tiny, small_data, ["sts/made"], label="broken", progress=False)
