"""A tiny base with pairs to train it on, trainings of it, and processes of their own for them."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

import mlpool
from mlpool.study.runs import context
from mlpool.training.train import train

WORDS = [f"w{i}" for i in range(60)]
# One process imports for all that the tests of a worker start: what it imports is said before it is first used, so all
# ask for what a study's runs need. It has run nothing, so that its children may.
SERVER = context()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny Llama in `base` and 40 triplets in `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("train")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=62,
        max_position_embeddings=64, eos_token_id=1, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            # Each word of a query has its translation in the positive: not known at the start, and learned quickly.
            query, other = torch.randint(30, (2, 3), generator=generator).tolist()
            row = {"query": query, "positive": [j + 30 for j in query], "negative": [j + 30 for j in other]}
            row = {name: " ".join([WORDS[j] for j in value]) for name, value in row.items()}
            row["positive"] += f" {WORDS[30 + i % 30]}"
            file.write(json.dumps(row) + "\n")
    return folder


def config_of(place: Path, output: Path, **changes) -> dict:
    return {
        "model": str(place / "base"),
        "design": "multi-layer-bidirectional",
        "pooler": {"num_latents": 4, "num_heads": 2, "head_dim": 8},
        "data": {"train": str(place / "pairs.jsonl")},
        "lora": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "loss": {"mini_batch_tokens": 32},
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "pooler_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def losses(output: Path) -> list[float]:
    """The loss of every step, of the newest checkpoint."""
    newest = max(output.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    one, other = mlpool.load(a).state_dict(), mlpool.load(b).state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def whole_run(place) -> Path:
    output = place / "whole"
    train(config_of(place, output))
    return output


# --- several processes ------------------------------------------------------------------------------------------------


def together(work: Callable[..., None], *arguments: Any, world: int = 2) -> list[Any]:
    """Processes that do `work(rank, *arguments)`, as torchrun would start them; ended, or not within five minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parts = [SERVER.Process(target=_part, args=(work, rank, world, port, arguments)) for rank in range(world)]
    for part in parts:
        part.start()
    for part in parts:
        part.join(300)
    return parts


def _part(work: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    work(rank, *arguments)
    if world > 1:
        torch.distributed.destroy_process_group()
