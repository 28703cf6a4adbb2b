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
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test."""
    import socket

    def refuse(*args: Any, **_: Any) -> Any:
        pytest.fail(f"a connection was tried: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
