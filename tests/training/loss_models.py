"""Encoders small enough to check a loss by hand, batches for them, and what a loss and its gradients are."""

import math

import torch
import transformers
from torch import nn

from mlpool import MultiLayerPool
from mlpool.training.losses import InfoNCE

PAD = 1
# Arguments of InfoNCE.
VARIANTS = {
    "hard negatives": {},
    "matryoshka": {"matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.3]},
    "masks": {"false_negatives": "margin", "margin": 0.0},
    "symmetric": {"symmetric": True},
}


class Table(nn.Module):
    """The mean of token vectors through tanh: an encoder small enough to check everything by hand."""

    def __init__(self, dtype=torch.float64, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(50, width, dtype=dtype))
        self.calls: list[dict] = []

    def forward(self, features):
        self.calls.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in features.items()})
        mask = features["attention_mask"][..., None].to(self.table)
        embedding = torch.tanh((self.table[features["input_ids"]] * mask).sum(1) / mask.sum(1))
        features["attention_mask"][:] = 0  # as sentence-transformers' Pooling does with prompts
        return {**features, "sentence_embedding": embedding}


class TinyLlama(nn.Module):
    """Two random Llama layers with dropout and a trainable pool over both, as a SentenceTransformer would call them."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=0.2,
        )  # fmt: skip
        self.model = transformers.LlamaModel(config)
        self.pool = MultiLayerPool(32, 2, num_latents=4, num_heads=2, head_dim=8, residual=False)
        if checkpointing:
            self.model.gradient_checkpointing_enable()

    def forward(self, features):
        mask = features["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=features["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        return {**features, "sentence_embedding": self.pool(out.hidden_states, mask)}


def column(texts: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), PAD), torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        part = slice(len(text)) if side == "right" else slice(width - len(text), width)
        ids[i, part], mask[i, part] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def random_texts(columns: int = 3, batch: int = 6, longest: int = 12, seed: int = 0) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return [[draw(2, 50, draw(1, longest + 1, 1)[0]) for _ in range(batch)] for _ in range(columns)]


def run(loss: InfoNCE, columns, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients; the same random numbers for every call."""
    torch.manual_seed(seed)
    loss.zero_grad()
    value = loss([dict(c) for c in columns], None)
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance: float = 1e-5) -> None:
    """Losses to an absolute, gradients to a relative tolerance in norm, and of the same parameters."""
    assert abs(float(got[0]) - float(want[0])) <= tolerance, (got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert got[1]
    everything = math.sqrt(sum(g.norm().item() ** 2 for g in want[1].values()))
    assert everything > 1e-3
    wrong = math.sqrt(sum((got[1][n] - g).norm().item() ** 2 for n, g in want[1].items()))
    assert wrong <= tolerance * everything, wrong / everything
