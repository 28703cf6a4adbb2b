"""An embedder is a SentenceTransformer: its evaluators, trainer, model card, Hub upload and movers work on it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import TEXTS, D

datasets = pytest.importorskip("datasets")
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import (  # noqa: E402
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

from mlpool.embedder import add_lora, load  # noqa: E402


@pytest.fixture(scope="module")
def embedder():
    return tiny.embedder(prompts={"query": "Q: "})


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol, rtol=0)


# --- evaluators and movers --------------------------------------------------------------------------------------------


def test_similarity_evaluator(embedder, tmp_path):
    from scipy.stats import spearmanr

    left, right, scores = TEXTS[:4], TEXTS[3:7], [0.1, 0.9, 0.5, 0.3]
    result = EmbeddingSimilarityEvaluator(left, right, scores, name="dev")(embedder, output_path=str(tmp_path))
    a, b = embedder.encode(left), embedder.encode(right)
    assert result["dev_spearman_cosine"] == pytest.approx(spearmanr((a * b).sum(1), scores).statistic, abs=1e-6)
    assert list(tmp_path.glob("*.csv"))


def test_retrieval_evaluator(embedder):
    """It encodes queries by encode_query, so with their prompt."""
    queries, corpus = {"q": TEXTS[0]}, {str(i): text for i, text in enumerate(TEXTS)}
    best = int((embedder.encode_query([TEXTS[0]]) @ embedder.encode(TEXTS).T).argmax())
    result = InformationRetrievalEvaluator(queries, corpus, {"q": {str(best)}}, name="ir")(embedder)
    assert result["ir_cosine_accuracy@1"] == 1.0


def test_what_it_says_of_itself(embedder):
    assert isinstance(embedder, SentenceTransformer)
    assert embedder.get_embedding_dimension() == D
    assert embedder.max_seq_length == 128
    assert embedder.device.type == "cpu"
    assert embedder.transformers_model is embedder[0].model
    assert embedder.config is embedder[0].model.config
    assert embedder.similarity_fn_name == "cosine"
    assert [type(module).__name__ for module in embedder] == ["Backbone", "Pooler"]


def test_casting():
    embedder = tiny.embedder()
    exact = embedder.encode(TEXTS)
    assert embedder.half().dtype == torch.float16
    close(embedder.encode(TEXTS), exact, 5e-3)
    embedder.to(torch.bfloat16)
    close(embedder.encode(TEXTS), exact, 3e-2)
    embedder.float().to("cpu")
    assert embedder.encode("a", device="cpu").dtype == np.float32


# --- model card and Hub -----------------------------------------------------------------------------------------------


def test_model_card(embedder, tmp_path):
    embedder.save(tmp_path / "m")
    card = (tmp_path / "m/README.md").read_text()
    assert "pip install 'mlpool[st]'" in card
    assert 'import mlpool\n\n# Download from the 🤗 Hub\nmodel = mlpool.load("sentence_transformers_model_id")' in card
    assert "SentenceTransformer(" not in card
    assert "multi-layer-bidirectional" in card
    load(tmp_path / "m").save(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == card
    embedder.save(tmp_path / "bare", create_model_card=False)
    assert not (tmp_path / "bare/README.md").exists()


@pytest.mark.parametrize("loaded", [True, False])
def test_push_to_hub(embedder, loaded, tmp_path, monkeypatch):
    from huggingface_hub import CommitInfo, HfApi, RepoUrl

    sent = {}

    def upload(self, repo_id, folder_path, **_):
        sent[repo_id] = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*")
                         if p.is_file()}  # fmt: skip
        return CommitInfo(
            commit_url="https://huggingface.co/org/mine/commit/1", commit_message="", commit_description="", oid="1"
        )

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    if loaded:
        embedder.save(tmp_path / "m")
        embedder = load(tmp_path / "m")
    assert embedder.push_to_hub("org/mine", replace_model_card=True).endswith("commit/1")
    files = sent["org/mine"]
    assert {"modules.json", "model.safetensors", "1_Pooler/pool.safetensors", "mlpool.json"} <= set(files)
    assert 'mlpool.load("org/mine")' in files["README.md"].decode()
    for name, data in files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    close(load(tmp_path / "downloaded").encode(TEXTS), embedder.encode(TEXTS))


# --- its trainer ------------------------------------------------------------------------------------------------------

ANCHORS = [f"question {i} of them" for i in range(16)]
ANSWERS = [f"answer {i * 7} to all" for i in range(16)]


def trainer(embedder, folder: Path, steps: int, evaluator=None, **options) -> SentenceTransformerTrainer:
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none", use_cpu=True,
        logging_steps=1, disable_tqdm=True, save_strategy="steps", save_steps=2, seed=3, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": ANSWERS})
    return SentenceTransformerTrainer(
        model=embedder, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(embedder),
        evaluator=evaluator,
    )  # fmt: skip


def losses(run: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True])
def test_trainer_saves_and_resumes(lora, tmp_path, caplog):
    def fresh():
        embedder = tiny.embedder()
        return add_lora(embedder, rank=2, dropout=0.0) if lora else embedder

    whole = trainer(fresh(), tmp_path / "whole", 4)
    whole.train()
    assert len(losses(whole)) == 4
    start = fresh().state_dict()
    moved = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, start[name])}
    trainable = {name for name, p in fresh().named_parameters() if p.requires_grad}
    assert moved == trainable
    assert any(name.startswith("pooler.") for name in moved)
    checkpoint = load(tmp_path / "whole/checkpoint-4")
    close(checkpoint.encode(TEXTS), whole.model.encode(TEXTS))
    assert {"optimizer.pt", "trainer_state.json"} <= {p.name for p in (tmp_path / "whole/checkpoint-2").iterdir()}
    assert json.loads((tmp_path / "whole/checkpoint-2/mlpool.json").read_text())["design"] == checkpoint[0].design
    again = trainer(fresh(), tmp_path / "whole", 4)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    close(losses(again)[-2:], losses(whole)[-2:], 1e-4)
    close(again.model.encode(TEXTS), whole.model.encode(TEXTS), 1e-4)


def test_trainer_loads_the_best_model(tmp_path):
    embedder = tiny.embedder()
    evaluator = EmbeddingSimilarityEvaluator(ANCHORS, ANSWERS, list(range(16)), name="dev")
    run = trainer(
        embedder, tmp_path, 4, evaluator, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_dev_spearman_cosine",
    )  # fmt: skip
    run.train()
    best = load(run.state.best_model_checkpoint)
    close(embedder.encode(TEXTS), best.encode(TEXTS))
    run.save_model(str(tmp_path))  # into the folder that holds the checkpoints
    close(load(tmp_path).encode(TEXTS), best.encode(TEXTS))
    assert (tmp_path / "checkpoint-2/modules.json").is_file()
