"""A tiny decoder and texts for it; a test module takes the fixture by name, `decoder = decoders.decoder`."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from made import WORDS, sentence

from mlpool.analysis.scores import Pairs

L, D = 3, 32
SMALL = {"num_latents": 5, "num_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A random Llama of 3 layers of 32, with a tokenizer that puts nothing around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=D, num_hidden_layers=L, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    ))  # fmt: skip
    folder = tmp_path_factory.mktemp("layers") / "tiny-llama"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **tokens).save_pretrained(folder)
    return folder


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]


def some_pairs(count: int = 30, seed: int = 1) -> Pairs:
    rng = random.Random(seed)
    return Pairs(some_texts(count, seed), some_texts(count, seed + 1), [rng.random() for _ in range(count)])


def shaken(pool: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return pool


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
