"""A teacher beside InfoNCE: the formulas in float64, cached alike, two processes, whole trainings, bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("datasets")

import tiny
from loss_models import Table, TinyLlama, assert_same, column, random_texts

from mlpool.corpus.negatives import Choice
from mlpool.training import teacher as module
from mlpool.training.config import read_config
from mlpool.training.data import load_pairs
from mlpool.training.losses import InfoNCE
from mlpool.training.mine import mine_pairs
from mlpool.training.teacher import Teacher
from mlpool.training.train import train

BATCH, T = 6, 0.3


class Known:
    """Embeddings in memory, in the place of a store's."""

    def __init__(self, width: int, rows: int = 40, seed: int = 0) -> None:
        self.array = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
        self.width = width

    def take(self, rows):
        return self.array[rows]


def with_embeddings(kind: str = "kl", width: int = 9, weight: float = 0.7) -> Teacher:
    made = Teacher(weight, T)
    made.kind, made._stores, made._known = kind, ["anchors", "documents"], [Known(width), Known(width, seed=1)]
    return made


def run(loss, texts, labels):
    """Loss and gradients, as `test_losses.run` with labels."""
    loss.zero_grad()
    value = loss([column(t) for t in texts], labels)
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def kl(targets, logits):
    """KL(softmax(targets) || softmax(logits)) of two lists, by its definition."""
    p, q = targets.softmax(-1), logits.softmax(-1)
    return sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(p)))


def by_hand(texts, labels, teacher, dims=(6,), weights=(1.0,), temperature=0.1):
    """What a teacher adds, one anchor at a time, and the gradient of the table."""
    model = Table()
    vectors = [[torch.tanh(model.table[text].mean(0)) for text in col] for col in texts]
    total = torch.zeros((), dtype=torch.float64)
    known = [torch.from_numpy(k.array).double() for k in teacher._known] if teacher._stores else []
    for i, anchor in enumerate(vectors[0]):
        for d, weight in zip(dims, weights, strict=True):
            if not known:
                own = torch.stack([F.cosine_similarity(anchor[:d], col[i][:d], dim=0) for col in vectors[1:]])
                total = total + weight * kl(labels[i].double() / T, own / temperature)
            elif teacher.kind == "kl":
                cosines = [F.cosine_similarity(anchor[:d], v[:d], dim=0) for col in vectors[1:] for v in col]
                numbers = [labels[j, c] for c in range(1, len(texts)) for j in range(BATCH)]
                theirs = [F.cosine_similarity(known[0][labels[i, 0]], known[1][n], dim=0) for n in numbers]
                total = total + weight * kl(torch.stack(theirs) / T, torch.stack(cosines) / temperature)
        if teacher.kind == "cosine":
            for c, col in enumerate(vectors):
                theirs = known[min(c, 1)][labels[i, c]]
                total = total + (1 - F.cosine_similarity(col[i], theirs, dim=0)) / len(vectors)
    value = teacher.weight * total / BATCH
    return value, torch.autograd.grad(value, model.table)[0]


def labels_of(teacher: Teacher, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if teacher._stores:
        return torch.randint(40, (BATCH, columns), generator=generator)
    return torch.rand(BATCH, columns - 1, generator=generator)


@pytest.mark.parametrize("dims", [None, ([6, 4, 2], [1.0, 0.5, 0.25])], ids=["whole", "matryoshka"])
@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("of", ["scores", "kl", "cosine"])
def test_formula(of, columns, dims, monkeypatch):
    """What a teacher adds to loss and gradient, in float64."""
    monkeypatch.setattr(module, "_SCORES", 40)  # blocks of 2 to 3 anchors
    teacher = Teacher(0.7, T) if of == "scores" else with_embeddings(of, 6)
    texts = random_texts(columns, BATCH)
    labels = labels_of(teacher, columns)
    options = {} if dims is None else {"matryoshka_dims": dims[0], "matryoshka_weights": dims[1]}
    without = run(InfoNCE(Table(), 0.1, mini_batch_tokens=16, **options), texts, labels)
    found = run(InfoNCE(Table(), 0.1, mini_batch_tokens=16, teacher=teacher, **options), texts, labels)
    value, gradient = by_hand(texts, labels, teacher, *(dims or ()))
    assert value > 0.01
    assert found[0] - without[0] == pytest.approx(float(value), abs=1e-6)  # the teacher's numbers are float32
    added = found[1]["model.table"] - without[1]["model.table"]
    assert (added - gradient).norm() < 1e-6 * gradient.norm()


def test_the_teacher_itself_is_its_best_student():
    """KL is 0 where the student's softmax is the teacher's, and no other scores give it."""
    texts, model = random_texts(4, BATCH), Table()
    with torch.no_grad():
        vectors = [F.normalize(model({**column(t)})["sentence_embedding"], dim=-1) for t in texts]
    scores = torch.stack([(vectors[0] * v).sum(-1) for v in vectors[1:]], 1)
    plain = InfoNCE(model, 0.1)([column(t) for t in texts])
    same = InfoNCE(model, 0.1, teacher=Teacher(1.0, 0.1))([column(t) for t in texts], scores)
    other = InfoNCE(model, 0.1, teacher=Teacher(1.0, 0.1))([column(t) for t in texts], scores.flip(1))
    assert abs(float((same - plain).detach())) < 1e-12
    assert float((other - plain).detach()) > 0.1


@pytest.mark.parametrize("of", ["scores", "kl", "cosine"])
def test_cached_alike(of):
    """auto, True and False give the same numbers, through a model whose activations are dropped."""
    teacher = Teacher(0.7, T) if of == "scores" else with_embeddings(of, 32)
    texts, model = random_texts(3, BATCH, 20), TinyLlama().double().eval()
    labels = labels_of(teacher, 3)
    want = run(InfoNCE(model, cached=False, mini_batch_tokens=None, teacher=teacher), texts, labels)
    for cached in (True, "auto"):
        got = run(InfoNCE(model, cached=cached, mini_batch_tokens=40, teacher=teacher), texts, labels)
        assert_same(got, want, 1e-6)


# --- whole trainings -------------------------------------------------------------------------------------------------

WORDS = ["how", "many", "layers", "does", "the", "pool", "read", "all", "of", "them", "and", "last", "one", "twice"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`pairs.jsonl`, mined by a small teacher into `mined.jsonl`, whose embeddings stay in `kept`."""
    folder = tmp_path_factory.mktemp("teacher")
    generator = np.random.default_rng(0)
    rows = [{s: f"{' '.join(generator.choice(WORDS, 3))} {i}" for s in ("anchor", "positive")} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine_pairs(folder / "pairs.jsonl", tiny.embedder("mean-bidirectional"), folder / "mined.jsonl",
               Choice(num_negatives=2), embeddings=folder / "kept")  # fmt: skip
    return folder


def config_of(place: Path, output: Path, teacher: dict | None, data=None, **changes) -> dict:
    return {
        "model": str(tiny.base("llama")), "design": "mean-bidirectional", "output_dir": str(output), "use_cpu": True,
        "data": {"train": str(place / "mined.jsonl"), **(data or {})}, "disable_tqdm": True, "logging_steps": 1,
        "loss": {"mini_batch_tokens": 64, "matryoshka_dims": [32, 8], "teacher": teacher}, "max_steps": 4,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2, **changes,
    }  # fmt: skip


def logged(output: Path) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> float:
    """The loss of the first step without a teacher."""
    output = tmp_path_factory.mktemp("alone")
    train(config_of(place, output, None, max_steps=1))
    return logged(output)[0]


@pytest.mark.parametrize(("kind", "data"), [("kl", {"scores": "scores"}), ("cosine", {})])
def test_the_teacher_is_in_the_steps_of_a_training(place, tmp_path, alone, kind, data):
    teacher = {} if data else {"kind": kind, "embeddings": str(place / "kept")}  # by default KL
    train(config_of(place, tmp_path, teacher, data, max_steps=1))
    assert logged(tmp_path)[0] > alone + 1e-3


def test_a_training_that_goes_on_ends_as_it_would_have(place, tmp_path):
    config = config_of(place, tmp_path / "a", {"embeddings": str(place / "kept")})
    train(config)
    whole = logged(tmp_path / "a")
    for name in ("trainer_state.json", "modules.json"):
        (tmp_path / "a" / name).unlink()
    shutil.rmtree(tmp_path / "a/checkpoint-4")
    train(config, resume=True)
    assert logged(tmp_path / "a") == pytest.approx(whole, abs=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def rows_of(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "mined.jsonl").read_text().splitlines()]


def test_scores_follow_the_negatives_that_are_chosen(tmp_path):
    """A random choice of negatives takes their scores along; rows differ in how many there are."""
    rows = []
    for i in range(20):
        names = [f"n{i} {j}" for j in range(2 + i % 3)]
        rows.append(
            {
                "anchor": f"a{i}",
                "positive": f"p{i}",
                "negatives": names,
                "t": [i, *(i + j for j in range(1, len(names) + 1))],
            }
        )
    pairs = load_pairs(rows, scores="t", num_negatives=2)
    assert pairs.column_names == ["anchor", "positive", "negative_1", "negative_2", "scores"]
    for i, row in enumerate(pairs):
        taken = [int(row[f"negative_{k}"].split()[1]) for k in (1, 2)]
        assert row["scores"] == [i, *(i + j + 1 for j in taken)]
    assert any(row["scores"][1] - row["scores"][0] > 1 for row in pairs)  # the choice was one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, r":2: no field 'scores', which has the teacher's scores"),
        ({"scores": [0.5, 0.1]}, r":2: scores holds 2 numbers, expected 3: the positive's and one of each of 2"),
        ({"scores": [0.5, 0.1, float("nan")]}, r":2: scores is \[0.5, 0.1, nan\], expected a list of finite numbers"),
        ({"scores": "0.5"}, r":2: scores is '0.5', expected a list of finite numbers"),
        ({"negative_1": None, "negative_2": None, "scores": [1]}, r":2: scores needs one positive and a negative"),
        ({"positive": ["a", "b"]}, r":2: scores needs one positive .*, got 2 positives and 2 negatives"),
    ],
)  # fmt: skip
def test_scores_that_are_wrong_are_named_by_their_line(place, tmp_path, change, message):
    rows = rows_of(place)[:4]
    rows[1] = {name: value for name, value in {**rows[1], **change}.items() if value is not None}
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load_pairs(path, scores="scores")


def test_a_teacher_that_cannot_be(place, tmp_path):
    for options, message in [
        ({"temperature": 0.0}, "the teacher's temperature must be above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"weight": 0.0}, "the teacher's weight must be above 0"),
        ({"kind": "mse"}, "kind must be one of"),
        ({"kind": "cosine"}, "'cosine' needs its embeddings"),
    ]:
        with pytest.raises(ValueError, match=message):
            Teacher(**options)
    with pytest.raises(FileNotFoundError, match=r"has no anchors\.jsonl; expected a folder that `mlpool mine"):
        Teacher(embeddings=str(tmp_path))
    shutil.copytree(place / "kept", tmp_path / "mixed")
    manifest = tmp_path / "mixed/anchors/manifest.json"
    manifest.write_text(re.sub(r'"identity": "\w{16}"', '"identity": "0123456789abcdef"', manifest.read_text()))
    with pytest.raises(ValueError, match="anchors and documents of different models, 0123456789abcdef, "):
        Teacher(embeddings=str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="compare a positive with negatives"):
        load_pairs(place / "mined.jsonl", scores="scores", num_negatives=0)


def test_a_teacher_and_what_it_says_belong_together(place, tmp_path):
    for teacher, data, message in [
        (None, {"scores": "scores"}, "data.scores is 'scores', but no loss uses it"),
        ({}, {}, "loss.teacher needs data.scores, .* got neither"),
        ({"embeddings": "kept"}, {"scores": "scores"}, "got both"),
        ({"temprature": 1}, {"scores": "scores"}, "unknown key in loss.teacher 'temprature'; nearest: temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_config(config_of(place, tmp_path / "a", teacher, data))
    texts = random_texts(3, BATCH)
    for labels, message in [(None, r"scores as labels \[6, 2\], got none"), (torch.rand(6, 3), r"got \[6, 3\]")]:
        with pytest.raises(ValueError, match=message):
            InfoNCE(Table(), teacher=Teacher())([column(t) for t in texts], labels)


def test_a_teacher_of_another_width_or_of_other_texts(place, tmp_path):
    columns = [column(t) for t in random_texts(2, BATCH)]
    with pytest.raises(ValueError, match=r"have 9 numbers, the student's 6: .* use kind: kl"):
        InfoNCE(Table(), teacher=with_embeddings("cosine", 9))(columns, torch.zeros(BATCH, 2, dtype=torch.long))
    made = Teacher(kind="cosine", embeddings=str(place / "kept"))
    made._known[0].width = 48
    with pytest.raises(ValueError, match="have 48 numbers, the student's 32"):  # before any text is embedded
        InfoNCE(tiny.embedder("mean-causal"), teacher=made)
    pairs = load_pairs([{"anchor": "how many", "positive": "never seen"}])
    with pytest.raises(ValueError, match=r"lack 1 of 1 texts in anchor, the first of pair 1: 'how many'; run `mlpool"):
        made.number(pairs)
