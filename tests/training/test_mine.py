"""`mlpool mine`: the miner's choice on the whole file, in blocks; what is never mined; resume; bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

import tiny
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from mlpool import cli
from mlpool.corpus import negatives, neighbours
from mlpool.corpus.negatives import Choice
from mlpool.corpus.text_store import Embeddings, TextStore, text_key
from mlpool.training.data import load_pairs
from mlpool.training.mine import mine_pairs

WORDS = ["how", "many", "layers", "does", "the", "pool", "read", "all", "of", "them", "and", "last", "one", "twice"]


class Fake(torch.nn.Module):
    """A model whose embedding of a text is the sum of its words' random vectors: near texts share words."""

    def __init__(self, seed: int = 0, broken: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), float(seed)))
        self.prompts = {"query": "asked "}
        self._broken = broken
        self._seed = seed

    def encode(self, texts, prompt=None, normalize_embeddings=False, **_):
        result = np.stack([self._one((prompt or "") + text) for text in texts])
        return result / np.linalg.norm(result, axis=1, keepdims=True)

    def _one(self, text):
        if self._broken and self._broken in text:
            return np.full(16, np.nan, np.float32)
        keys = [text_key(word) % 2**31 for word in text.split()]
        return sum(np.random.default_rng([self._seed, key]).normal(size=16) for key in keys).astype(np.float32)


class Judge(torch.nn.Module):
    """A cross-encoder that likes long documents."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self._asked: list = []

    def predict(self, pairs, batch_size, convert_to_tensor, show_progress_bar):
        self._asked += pairs
        return torch.tensor([len(document) / 100 for _, document in pairs])


def some_pairs(count: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """Texts of a few words; anchors of several positives, copies in other case and spacing, an anchor as a document."""
    generator = np.random.default_rng(seed)

    def draw(size: int) -> str:
        return " ".join(generator.choice(WORDS, size))

    rows = [{"anchor": f"{draw(4)} q{i}", "positive": f"{draw(5)} d{i}"} for i in range(count)]
    rows.append({"anchor": rows[3]["anchor"], "positive": f"{rows[3]['anchor']} yes"})
    rows.append({"anchor": f" {rows[3]['anchor'].upper()}", "positive": rows[9]["positive"].title()})
    rows.append({"anchor": draw(3), "positive": f"{rows[5]['anchor'].upper()}  "})
    return rows


def run(folder: Path, rows=None, model=None, choice=None, name="out.jsonl", **options):
    return mine_pairs(rows or some_pairs(), model or Fake(), folder / name, choice, **{"search": "torch", **options})


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small(monkeypatch):
    """Several blocks of several parts, as of a large file."""
    monkeypatch.setattr(negatives, "BLOCK", 16)
    monkeypatch.setattr(negatives, "PART", 12)
    monkeypatch.setattr(Embeddings, "ROWS", 7)


# --- what is mined ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"range_min": 2, "range_max": 9, "num_negatives": 4}, {"relative_margin": 0.1, "range_max": 42},
     {"absolute_margin": 0.05, "max_score": 0.6, "min_score": -0.5, "range_max": 42}],
)  # fmt: skip
def test_the_choice_is_that_of_the_miner_on_the_whole_file(tmp_path, small, options):
    rows = [{**row, "positive": f"{row['positive']} !"} for row in some_pairs()[:40]]
    embedder = tiny.embedder("mean-bidirectional", prompts={"query": "all of "})
    run(tmp_path, rows, embedder, Choice(**options))
    expected = mine_hard_negatives(
        Dataset.from_list(rows), embedder, output_format="n-tuple", output_scores=True, verbose=False,
        **{"range_max": 30, **Choice(**options).as_options()},
    )  # fmt: skip
    found = read(tmp_path / "out.jsonl")
    assert len(found) == len(expected) > 10
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=2e-5)
        assert [mine[name] for name in theirs if name != "scores"] == [theirs[n] for n in theirs if n != "scores"]


def test_no_positive_and_no_copy_of_one_or_of_the_anchor_is_mined(tmp_path, small):
    rows = some_pairs()
    summary = run(tmp_path, rows, choice=Choice(num_negatives=8))
    mined = read(tmp_path / "out.jsonl")
    assert [(r["anchor"], r["positive"]) for r in mined] == [(r["anchor"], r["positive"]) for r in rows]
    for row in mined:
        taken = [text_key(row[f"negative_{i + 1}"]) for i in range(8)]
        same = [r for r in rows if text_key(r["anchor"]) == text_key(row["anchor"])]
        forbidden = {text_key(r["positive"]) for r in same} | {text_key(row["anchor"])}
        assert len({*taken}) == 8
        assert not forbidden & {*taken}
    assert summary["counts"] == {
        "pairs": 43, "written": 43, "dropped": 0, "found": {"8": 43}, "anchors": 41, "documents": 42,
    }  # fmt: skip
    # Without these rules they would be: the nearest document of row 5's anchor is its copy, of row 3's its positives.
    queries = Fake().encode([r["anchor"] for r in rows], prompt="asked ")
    nearest = (queries @ Fake().encode([r["positive"] for r in rows]).T).argsort(1)[:, ::-1]
    assert 42 in nearest[5, :8]
    assert {3, 40, 41} & {*nearest[3, :8].tolist()}


def test_what_is_written_is_read_by_load_pairs_and_said_beside_it(tmp_path):
    summary = run(tmp_path, choice=Choice(num_negatives=2, relative_margin=0.05))
    pairs = load_pairs(tmp_path)  # the folder: what lies beside is no data
    assert pairs.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert len(pairs) == summary["counts"]["written"] < 43
    told = json.loads((tmp_path / "out.jsonl.meta").read_text())
    assert told == summary
    assert told["options"]["relative_margin"] == 0.05
    assert len(told["model"]["identity"]) == 16
    rows = read(tmp_path / "out.jsonl")
    assert told["scores"]["negatives"]["mean"] == pytest.approx(np.mean([r["scores"][1:] for r in rows]), abs=1e-5)
    assert all(score <= 0.95 * row["scores"][0] + 1e-5 for row in rows for score in row["scores"][1:])
    for row in rows[:5]:
        texts = [row["positive"], row["negative_1"], row["negative_2"]]
        expected = Fake().encode(texts) @ Fake().encode([row["anchor"]], prompt="asked ")[0]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.meta"]


def test_texts_of_a_corpus_may_be_negatives(tmp_path):
    rows = some_pairs()[:4]
    (tmp_path / "more.txt").write_text("\n".join([*(f"{row['anchor']} more" for row in rows), "", "the pool"]))
    run(tmp_path, rows, choice=Choice(num_negatives=1), corpus=[tmp_path / "more.txt"])
    assert [row["negative_1"] for row in read(tmp_path / "out.jsonl")] == [f"{row['anchor']} more" for row in rows]


def test_a_cross_encoder_decides_among_what_the_embeddings_find(tmp_path, small):
    judge = Judge()
    run(tmp_path, choice=Choice(num_negatives=2, range_max=6, max_score=0.28), cross_encoder=judge)
    rows = read(tmp_path / "out.jsonl")
    assert rows
    for row in rows:
        lengths = [len(row[name]) / 100 for name in ("positive", "negative_1", "negative_2")]
        assert row["scores"] == pytest.approx([lengths[0], *sorted(lengths[1:], reverse=True)], abs=0.03)
        assert max(lengths[1:]) <= 0.28
    texts = {text for row in some_pairs() for text in row.values()}
    assert {text for pair in judge._asked for text in pair} <= texts


def test_the_searches_agree(tmp_path):
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(n, 8)).astype(np.float32) for n in (70_000, 3, 40)]
    queries, cpu = generator.normal(size=(9, 8)).astype(np.float32), torch.device("cpu")
    by = {name: neighbours.nearest(queries, Embeddings(arrays), 50, cpu, name) for name in ("faiss", "torch")}
    expected = np.argsort(-(queries @ np.concatenate(arrays).T), axis=1)[:, :50]
    for scores, rows in by.values():
        assert (rows == expected).all()
        assert np.allclose(scores, np.take_along_axis(queries @ np.concatenate(arrays).T, expected, 1), atol=1e-5)
    few = neighbours.nearest(queries, Embeddings(arrays[1:2]), 5, cpu, "torch")
    assert (few[1][:, 3:] == -1).all()
    assert np.isinf(few[0][:, 3:]).all()


# --- again -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", negatives.SAMPLING)
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, small, monkeypatch, sampling):
    choice = Choice(num_negatives=2, sampling=sampling)
    run(tmp_path, choice=choice, name="whole.jsonl")
    real, made = negatives._Miner.block, []

    def block(self, start, pairs, bar):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(start)
        return real(self, start, pairs, bar)

    monkeypatch.setattr(negatives._Miner, "block", block)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, choice=choice)
    assert not (tmp_path / "out.jsonl").exists()
    made.append(None)  # no third is made, and none again
    (tmp_path / ".out.jsonl.mining/blocks/block-00001.npz").write_bytes(b"cut")  # but for a broken one
    monkeypatch.setattr(negatives._Miner, "block", lambda *args: made.append(args[1]) or real(*args))
    run(tmp_path, choice=choice)
    assert made == [0, 16, None, 16, 32]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_is_not_made_again(tmp_path, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(negatives._Miner, "block", None)
    assert run(tmp_path) == first


def test_kept_embeddings_serve_other_choices(tmp_path, monkeypatch):
    run(tmp_path, embeddings=tmp_path / "kept")
    monkeypatch.setattr(Fake, "encode", None)
    run(tmp_path, choice=Choice(num_negatives=1), name="other.jsonl", embeddings=tmp_path / "kept")
    assert "negative_2" not in read(tmp_path / "other.jsonl")[0]
    assert len(TextStore(tmp_path / "kept", "documents")) == 42


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_is_there_of_another_run_is_refused(tmp_path):
    run(tmp_path, embeddings=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"out\.jsonl is of another run: model was '\w{16}', now '\w{16}'.*overwrite"):
        run(tmp_path, model=Fake(seed=1))
    with pytest.raises(ValueError, match=r"another run: num_negatives was 3, now 2\. Name"):
        run(tmp_path, choice=Choice(num_negatives=2))
    with pytest.raises(ValueError, match=r"kept.* holds another run: the model was Fake"):
        run(tmp_path, model=Fake(seed=1), name="new.jsonl", embeddings=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"kept.anchors holds embeddings of other texts than these 5 .*another folder"):
        run(tmp_path, some_pairs()[:5], name="new.jsonl", embeddings=tmp_path / "kept")
    before = (tmp_path / "out.jsonl").read_bytes()
    run(tmp_path, model=Fake(seed=1), overwrite=True)
    assert (tmp_path / "out.jsonl").read_bytes() != before
    (tmp_path / "out.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="not as it was written"):
        run(tmp_path, model=Fake(seed=1))


def test_a_file_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="no `mlpool mine` wrote it"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.jsonl"):
        run(tmp_path, name="out.csv")


def test_a_margin_that_leaves_too_few(tmp_path):
    with pytest.raises(ValueError, match=r"not one of 43 pairs has 3 negatives by absolute_margin=3\.0; 43 found 0"):
        run(tmp_path, choice=Choice(absolute_margin=3.0))
    with pytest.raises(ValueError, match=r"\d+ of 43 pairs have fewer than 3 negatives by relative_margin=0\.5 \(first:"
                       r" pair \d+, '.*', has \d\).*drop"):  # fmt: skip
        run(tmp_path, choice=Choice(relative_margin=0.5), too_few="refuse")
    assert not (tmp_path / "out.jsonl").exists()
    run(tmp_path, choice=Choice(relative_margin=0.05), too_few="drop")  # not hindered by what these left


def test_embeddings_that_are_not_finite_are_named(tmp_path):
    rows = some_pairs()
    with pytest.raises(ValueError, match=r"documents\.jsonl:8: its embedding is NaN"):
        run(tmp_path, rows, Fake(broken="d7"))
    run(tmp_path, rows, embeddings=tmp_path / "kept")
    shard = tmp_path / "kept/documents/shard-00000.npy"
    array = np.load(shard)
    array[7, 3] = np.inf
    np.save(shard, array)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        run(tmp_path, rows, name="new.jsonl", embeddings=tmp_path / "kept")
    manifest = tmp_path / "kept/documents/manifest.json"  # of a writer that did not look
    told = json.loads(manifest.read_text())
    told["shards"][0]["sha256"] = None
    manifest.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"row 7 is NaN or infinity, documents\.jsonl:8, '.* d7'"):
        run(tmp_path, rows, name="new.jsonl", embeddings=tmp_path / "kept")


def test_choices_that_cannot_be(tmp_path, monkeypatch):
    for options, message in [
        ({"num_negatives": 0}, "num_negatives must be an integer"),
        ({"range_min": -1}, "range_min must be 0 or more"),
        ({"range_min": 5, "range_max": 7}, "leaves 2 documents for 3 negatives"),
        ({"sampling": "best"}, "sampling must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            Choice(**options)
    with pytest.raises(ValueError, match="judges by a margin or a bound"):
        run(tmp_path, cross_encoder=Judge())
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlpool\[mine\]'"):
        run(tmp_path, search="faiss")
    run(tmp_path, search="auto")  # torch


# --- as it is typed --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": r["anchor"], "a": r["positive"]}) + "\n" for r in some_pairs()))
    words = ["mine", str(path), "-m", str(tiny.base()), "--design", "mean-bidirectional", "-o", f"{tmp_path}/out.jsonl",
             "--anchor-column", "q", "--positive-column", "a", "-n", "2", "--range-min", "1",
             "--absolute-margin", "0", "--device", "cpu"]  # fmt: skip
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    rows = read(tmp_path / "out.jsonl")
    assert f"{len(rows)} of 43 pairs written, {43 - len(rows)} dropped" in shown
    assert shown.splitlines()[1].split()[:3] == [
        "positives",
        str(len(rows)),
        f"{np.mean([r['scores'][0] for r in rows]):.4f}",
    ]
    assert cli.main([*words, "--overwrite", "--cross-encoder", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert cli.main([*words[:8], *words[10:]]) == 2
    assert "name both columns" in capsys.readouterr().err
