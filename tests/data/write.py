"""Folders as the version that runs this saves them, kept beside this file for the versions to come.

    cd tests/data && PYTHONPATH=../..:../../kernels python write.py

A pool, an embedder, an adapter with its base model, embeddings (finished, and cut off after two shards), a study.
Beside each stands what it gave then. Run it again only for a format that is new: what is here, users have on disk.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import mlpool
from mlpool.corpus.encode import encode_files
from mlpool.embedder import add_lora, load
from mlpool.study import study

HERE = Path(__file__).parent
LAYERS, HIDDEN = 3, 8
SMALL = {"num_latents": 2, "num_heads": 2, "head_dim": 4}
TEXTS = ["how many layers does the pool read", "a", "Zürich, 東京 🙂", "all of them, and the last one twice over"]
IDS = ["first", "second", "third", "fourth"]
TASK = "sts/few"
WORDS = ["card", "bank", "cash", "rate", "film", "plot", "song", "band", "cell", "gene", "drug", "test"]
# What a study's output holds that is about one machine, or large, and that no later version reads.
NOT_KEPT = ("log.txt", "model", "comparison", "results", "predictions", ".*", "*.html", "*.md")


def write_all() -> None:
    """Every folder of this module's docstring, in the current directory, so that paths inside are relative."""
    write_base(Path("base"))
    write_pool(Path("pool"))
    embedder = load("base", "multi-layer-bidirectional", SMALL, device="cpu", prompts={"query": "ask: "})
    random_weights(embedder[1])
    embedder.save("embedder", create_model_card=False)
    np.save("embedder.npy", embedder.encode(TEXTS))
    write_encoded(embedder)
    adapter = add_lora(load("base", "last-layer-bidirectional", SMALL, device="cpu"), rank=2)
    random_weights(adapter[1])
    random_weights(adapter[0].model, only="lora_B")
    adapter.save("adapter", create_model_card=False)
    np.save("adapter.npy", adapter.encode(TEXTS))
    write_study(Path("study"))
    for path in Path().rglob("*.json"):  # where the base lay, as on the machine of somebody else
        if (place := str(HERE.resolve())) in (text := path.read_text(encoding="utf8")):
            path.write_text(text.replace(place, "/somewhere"), encoding="utf8")


def write_base(folder: Path) -> None:
    """A random Qwen2 of bytes: no merges, EOS behind every text."""
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = transformers.Qwen2Config(
        vocab_size=len(letters), hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    random_weights(transformers.Qwen2Model(config)).save_pretrained(folder)


def write_pool(folder: Path) -> None:
    pool = random_weights(mlpool.MultiLayerPool(HIDDEN, LAYERS, **SMALL))
    pool.save_pretrained(folder)
    states = torch.randn(2, LAYERS, HIDDEN, generator=torch.Generator().manual_seed(2))
    np.savez("pool.npz", states=states.numpy(), embedding=pool(layer_states=states).detach().numpy())


def write_encoded(embedder: Any) -> None:
    """`encoded` whole; `cut-off` as a kill in the third shard leaves it."""
    rows = [{"id": name, "text": text} for name, text in zip(IDS, TEXTS, strict=True)]
    write_lines(Path("texts.jsonl"), rows)
    options: dict[str, Any] = {"id_column": "id", "progress": False}
    encode_files(embedder, "texts.jsonl", "encoded", shard_size=3, **options)
    encode, calls = embedder.encode, iter(range(9))

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    embedder.encode = cut_off
    try:
        encode_files(embedder, "texts.jsonl", "cut-off", shard_size=1, batch_size=2, **options)
    except KeyboardInterrupt:
        del embedder.encode


def write_study(folder: Path) -> None:
    rng = random.Random(0)
    sentence = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))  # noqa: E731
    data = Path("study-data")
    write_lines(data / "pairs.jsonl", [{"query": sentence(), "positive": sentence()} for _ in range(16)])
    pairs = [{"sentence1": sentence(), "sentence2": sentence(), "score": rng.random()} for _ in range(12)]
    write_lines(data / TASK / "test.jsonl", pairs)
    study({
        "base": "base", "data_dir": str(data), "output": str(folder), "data": {"train": "pairs.jsonl"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "pooler_learning_rate": 0.5},
        "designs": ["mean-bidirectional", {"name": "multi-layer-bidirectional", "label": "multi", "pooler": SMALL}],
        "seeds": [0, 1], "evaluate": {"tasks": [TASK]},
    }, estimate=False)  # fmt: skip
    for pattern in NOT_KEPT:
        for path in sorted(folder.rglob(pattern), reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")


def random_weights(module: torch.nn.Module, only: str = "") -> Any:
    """Every parameter (whose name holds `only`) off its start, where a gate of zero hides what stands behind it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


if __name__ == "__main__":
    if Path.cwd() != HERE.resolve():
        raise SystemExit(f"run this in {HERE}")
    write_all()
