"""A tiny random encoder and lines of data, for tests of evaluation."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOPICS = {
    "money": ["card", "bank", "money", "cash", "rate", "loan", "coin"],
    "film": ["film", "actor", "scene", "plot", "song", "band", "rate"],
    "health": ["cell", "gene", "blood", "heart", "virus", "drug", "test"],
}
WORDS = sorted({word for words in TOPICS.values() for word in words})


def tiny_model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32, "mean")], device="cpu")


def sentence(generator: random.Random, words: Iterable[str] = WORDS) -> str:
    return " ".join(generator.choices(list(words), k=generator.randint(3, 9)))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Calls:
    """What a model was asked to encode."""

    def __init__(self, model: Any):
        self.encode, self.prompts, self.texts = model.encode, {}, Counter()
        model.encode = self

    def __call__(self, inputs: list[str], prompt: str | None = None, **options: Any) -> Any:
        self.texts.update(inputs)
        self.prompts.update(dict.fromkeys(inputs, prompt))
        return self.encode(inputs, prompt=prompt, **options)
