"""Fixtures of tests of evaluation: `pytest_plugins = ["evaluation_fixtures"]` in a test."""

import random
from pathlib import Path
from typing import Any

import pytest
from made import TOPICS, WORDS, sentence, tiny_model, write_jsonl


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare BERT of 2 layers of 32, random, with a tokenizer that knows WORDS."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    ))  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "tiny-bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Any:
    """A new SentenceTransformer each time: tests change it."""
    return tiny_model(tiny_folder)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, in the shapes that `local_tasks` reads."""
    data, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for split in ("dev", "test"):
        pairs = []
        for _ in range(60):
            first = sentence(rng)
            shared = rng.randint(0, 5)
            second = " ".join([*first.split()[:shared], *sentence(rng).split()])
            pairs.append({"sentence1": first, "sentence2": second, "score": shared + rng.random(), "source": "made"})
        write_jsonl(data / f"sts/made/{split}.jsonl", pairs)
        labelled = [
            {"sentence1": p["sentence1"], "sentence2": p["sentence2"], "label": int(p["score"] > 3)} for p in pairs
        ]
        write_jsonl(data / f"pair_classification/made/{split}.jsonl", labelled)
    documents = [{"_id": f"d{i}", "title": "film" if i % 3 else "", "text": sentence(rng)} for i in range(80)]
    queries = [{"_id": f"q{i}", "text": " ".join(documents[i]["text"].split()[:3])} for i in range(40)]
    write_jsonl(data / "retrieval/made/corpus.jsonl", documents)
    write_jsonl(data / "retrieval/made/queries.jsonl", queries)
    lines = [f"q{i}\td{i}\t2\nq{i}\td{(i * 7 + 1) % 80}\t1\n" for i in range(38)]  # two queries without relevant ones
    (data / "retrieval/made/qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    for split, count in (("train", 40), ("test", 25)):
        rows = [{"text": sentence(rng, words), "label": label} for _ in range(count) for label, words in TOPICS.items()]
        write_jsonl(data / f"classification/made/{split}.jsonl", rows)
    (data / "sts" / "train_only").mkdir()
    write_jsonl(data / "sts/train_only/train.jsonl", pairs)
    return data


@pytest.fixture
def small_mteb(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """One of mteb's own tasks of each type, with a few made rows for its data; names to types."""
    from datasets import Dataset, DatasetDict

    from mlpool.evaluation.tasks import mteb_tasks

    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(60)]
    labelled = [(sentence(rng, words), i) for i, words in enumerate(TOPICS.values()) for _ in range(20)]
    text, label = map(list, zip(*labelled, strict=True))
    scores = [rng.random() * 5 for _ in range(30)]
    docs = Dataset.from_dict({"id": [f"d{i}" for i in range(40)], "text": texts[:40], "title": [""] * 40})
    asked = Dataset.from_dict({"id": [f"q{i}" for i in range(10)], "text": texts[40:50]})
    relevant = {f"q{i}": {f"d{i}": 1, f"d{i + 20}": 1, f"d{i + 1}": 0} for i in range(10)}
    found = {"corpus": docs, "queries": asked, "relevant_docs": relevant, "top_ranked": None}
    ranked = {**found, "top_ranked": {f"q{i}": [f"d{j}" for j in range(i, i + 25)] for i in range(10)}}
    pair = {"sentence1": texts[:30], "sentence2": texts[30:]}
    summaries = {
        "text": texts[:6], "human_summaries": [texts[i : i + 3] for i in range(6)],
        "machine_summaries": [texts[10 + 4 * i : 14 + 4 * i] for i in range(6)],
        "relevance": [[rng.random() * 5 for _ in range(4)] for _ in range(6)],
    }  # fmt: skip
    topics = Dataset.from_dict({"text": text, "label": label})
    clusters = {"sentences": [text, text[10:50]], "labels": [label, label[10:50]]}
    data = {
        "STSBenchmark": {"test": Dataset.from_dict({**pair, "score": scores})},
        "Banking77Classification": DatasetDict(dict.fromkeys(("train", "test"), topics)),
        "NFCorpus": {"default": {"test": found}},
        "AskUbuntuDupQuestions": {"default": {"test": ranked}},
        "TwitterURLCorpus": {"test": Dataset.from_dict({**pair, "labels": [i % 2 for i in range(30)]})},
        "ArxivClusteringP2P": {"test": Dataset.from_dict(clusters)},
        "TwentyNewsgroupsClustering.v2": {"test": Dataset.from_dict({"sentences": text, "labels": label})},
        "SummEval": {"test": Dataset.from_dict(summaries)},
        "SummEvalSummarization.v2": {"test": Dataset.from_dict(summaries)},
    }  # fmt: skip
    types = {}
    for task in mteb_tasks(data):

        def load_data(self: Any, *_: Any, **__: Any) -> None:
            self.dataset, self.data_loaded = data[self.metadata.name], True

        monkeypatch.setattr(type(task), "load_data", load_data)
        types[task.metadata.name] = task.metadata.type
    return types


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test."""
    import socket

    def refuse(*args: Any, **_: Any) -> Any:
        pytest.fail(f"a connection was tried: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
