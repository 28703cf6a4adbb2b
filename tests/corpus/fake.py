"""A model whose embeddings are known; needs so little that a process with it starts quickly."""

import hashlib
import time

import numpy as np
import torch

DIMENSION = 8


def embedding_of(text: str) -> np.ndarray:
    """The fake model's embedding, from the text alone."""
    numbers = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.int32).astype(np.float64)
    return (numbers / np.linalg.norm(numbers)).astype(np.float32)


def embeddings_of(texts: list[str]) -> np.ndarray:
    return np.stack([embedding_of(text) for text in texts])


class Fake(torch.nn.Module):
    """A model whose embedding of a text depends on the text alone; counts and delays."""

    def __init__(self, delay: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), float(seed)))
        self.prompts = {"query": "Q: "}
        self._delay = delay
        self._calls: list[int] = []

    def encode(self, texts, prompt=None, truncate_dim=None, normalize_embeddings=False, **_):
        self._calls.append(len(texts))
        time.sleep(self._delay * len(texts))
        result = embeddings_of([(prompt or "") + text for text in texts])[:, :truncate_dim]
        return result / np.linalg.norm(result, axis=1, keepdims=True) if normalize_embeddings else result
