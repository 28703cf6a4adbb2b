"""The identity: the same for the same model, another one for every change that makes other embeddings."""

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from made import tiny_model
from torch import nn

import mlpool
from mlpool.embedder.identity import identity, with_settings

pytest_plugins = ["evaluation_fixtures"]


def flip_one_bit(model: Any) -> None:
    weight = model[0].model.encoder.layer[1].output.dense.weight
    weight.data.view(torch.int32)[3, 5] ^= 1


def swap_two(model: Any) -> None:
    attention = model[0].model.encoder.layer[0].attention.self
    attention.query.weight.data, attention.key.weight.data = attention.key.weight.data, attention.query.weight.data


def change_pooling(model: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model[1] = Pooling(32, "cls")


def change_tokenizer(model: Any) -> None:
    from tokenizers import processors

    frame = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])  # no SEP any more
    model.tokenizer.backend_tokenizer.post_processor = frame


CHANGES = {
    "one bit": flip_one_bit,
    "two tensors swapped": swap_two,
    "precision": lambda model: model.to(torch.bfloat16),
    "a buffer": lambda model: model[0].model.register_buffer("extra", torch.zeros(3)),
    "attention flag of a module": lambda m: setattr(m[0].model.encoder.layer[1].attention.self, "is_causal", True),
    "attention flag of the config": lambda model: setattr(model[0].model.config, "is_causal", True),
    "a number in a module": lambda model: setattr(model[0].model.encoder.layer[0].output.LayerNorm, "eps", 1e-3),
    "pooling": change_pooling,
    "another module": lambda model: model.append(nn.Identity()),
    "a prompt": lambda model: model.prompts.update(query="Question: "),
    "another prompt": lambda model: model.prompts.update(query="Query: "),
    "default prompt": lambda model: setattr(model, "default_prompt_name", "query"),
    "length": lambda model: setattr(model, "max_seq_length", 16),
    "dimensions": lambda model: setattr(model, "truncate_dim", 8),
    "similarity": lambda model: setattr(model, "similarity_fn_name", "dot"),
    "tokenizer": change_tokenizer,
}


def test_every_change_is_a_new_identity(tiny_folder):
    found = {"none": identity(tiny_model(tiny_folder))}
    for name, change in CHANGES.items():
        model = tiny_model(tiny_folder)
        change(model)
        found[name] = identity(model)
    assert len(set(found.values())) == len(found), found


def test_the_same_model_keeps_its_identity(tiny, tiny_folder, tmp_path):
    before = identity(tiny)
    assert len(before) == 16
    assert identity(tiny) == before
    tiny.encode(["bank money", "film " * 100])
    assert identity(tiny.train()) == before
    assert identity(tiny_model(Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere")))) == before


def test_the_same_after_saving(tiny, tmp_path):
    """In other processes too: test_evaluate.py, test_two_processes."""
    from sentence_transformers import SentenceTransformer

    tiny.save(str(tmp_path / "saved"))
    assert identity(SentenceTransformer(str(tmp_path / "saved"), device="cpu")) == identity(tiny)


@pytest.mark.gpu
def test_the_same_on_a_gpu(tiny):
    before = identity(tiny)
    assert identity(tiny.to("cuda")) == before


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("decoder") / "llama"
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, eos_token_id=3
    )).save_pretrained(folder)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def test_designs_differ_and_stay(decoder_folder, tmp_path):
    """Eight designs on one base: other attention or pooling, another identity; packing and encoding change none."""
    from mlpool.embedder import DESIGNS, load

    found = {}
    for name in DESIGNS:
        torch.manual_seed(0)
        embedder = load(decoder_folder, name, device="cpu")
        found[name] = identity(embedder)
        embedder.encode(["card bank", "film"])
        assert identity(embedder) == found[name], name
    assert len(set(found.values())) == len(found), found
    embedder.save(str(tmp_path / "saved"))
    assert identity(load(tmp_path / "saved", device="cpu")) == found[name]


def test_one_attention_flag_apart(decoder_folder):
    """The same weights and pool, causal and bidirectional, loaded bare: what a cache by name and weights mixes up."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(decoder_folder)
    causal = identity(model)
    mlpool.bidirectional(model)
    both = identity(model)
    mlpool.pack(model)
    assert identity(model) == both != causal
    mlpool.unpack(model)
    mlpool.causal(model)
    assert identity(model) == causal


def test_settings():
    assert with_settings("abc", None) == "abc"
    assert len({"abc", *(with_settings("abc", s) for s in ("none", ["mteb", "{instruction} "], ["mteb", "x"]))}) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_dtypes_sizes_and_ties(dtype):
    """Odd sizes, nothing at all, no dimension, a transposed view and tied weights are all hashed by what they hold."""

    def module(value: float = 1) -> nn.Module:
        m = nn.Module()
        m.register_buffer("a", torch.full((3, 5), value).to(dtype))
        m.register_buffer("t", torch.arange(15).reshape(3, 5).to(dtype).T)
        m.register_buffer("none", torch.empty(0, dtype=dtype))
        m.register_buffer("scalar", torch.tensor(1).to(dtype))
        m.register_buffer("tied", m.a)
        return m

    assert identity(module()) == identity(module()) != identity(module(0))


def test_fast():
    """At least half as fast as one thread's bare sha256, which reaches 900 MB/s here and more elsewhere."""
    model = nn.Linear(8192, 8192, bias=False)  # 268 MB
    data = model.weight.detach().numpy()
    started = time.perf_counter()
    hashlib.sha256(data.data).digest()
    bare = time.perf_counter() - started
    started = time.perf_counter()
    identity(model)
    assert time.perf_counter() - started < 2 * bare + 0.1
