"""Train the pool on real pairs and measure STS-B: mean pooling, the default pool, the released equations.

    python examples/train_pool.py --data ../shared/data

The backbone stays as it is, so its layer states are taken once and each pool trains in about a minute on two CPU cores.
The learning rate is the one of the best STS-B dev score; the test set is read once, at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from minilm import Encoder
from scipy.stats import spearmanr
from torch import Tensor

from mlpool import MultiLayerPool

SIZES = {"num_latents": 64, "num_heads": 6, "head_dim": 64, "ff_mult": 1}
POOLS = {"default (gated residual)": True, "released equations, same size": False}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
TEMPERATURE = 0.05


def read(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"no data at {path}; pass --data with folders pairs/ and sts/ of JSONL files")
    return [json.loads(line) for line in path.open()]


def pairs(data: Path, count: int) -> tuple[list[str], list[str]]:
    """`count` pairs, evenly from every set."""
    sets = sorted((data / "pairs").glob("*/train.jsonl"))
    rows = [row for path in sets for row in read(path)[: count // len(sets)]]
    return [r["query"] for r in rows], [r["positive"] for r in rows]


def sts_states(encoder: Encoder, path: Path) -> tuple[Tensor, Tensor, list[float]]:
    rows = read(path)
    left, right = (encoder.encode([r[name] for r in rows]) for name in ("sentence1", "sentence2"))
    return left, right, [r["score"] for r in rows]


@torch.no_grad()
def sts_score(embed: Callable[[Tensor], Tensor], split: tuple[Tensor, Tensor, list[float]]) -> float:
    """Spearman correlation of cosine similarity with the human scores."""
    left, right, scores = split
    return float(spearmanr((embed(left) * embed(right)).sum(1), scores).statistic)


def as_function(pool: MultiLayerPool) -> Callable[[Tensor], Tensor]:
    return lambda x: pool(layer_states=x)


def spread(scores: list[float]) -> str:
    return f"{mean(scores):.4f}" + (f" ± {stdev(scores):.4f}" if len(scores) > 1 else "")


def train(pool: MultiLayerPool, queries: Tensor, positives: Tensor, rate: float, steps: int, batch: int) -> None:
    """InfoNCE with in-batch negatives."""
    optimizer = torch.optim.AdamW(pool.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 20) * (1 - s / steps))
    pool.train()
    for _ in range(steps):
        part = torch.randperm(len(queries))[:batch]
        q, p = pool(layer_states=queries[part]), pool(layer_states=positives[part])
        loss = F.cross_entropy(q @ p.T / TEMPERATURE, torch.arange(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pool.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    encoder = Encoder(max_length=96)
    texts = pairs(args.data, args.pairs)
    print(f"layer states of {2 * len(texts[0])} training texts and STS-B ...", flush=True)
    queries, positives = (encoder.encode(side) for side in texts)
    dev, test = (sts_states(encoder, args.data / f"sts/stsb/{split}.jsonl") for split in ("dev", "test"))

    def new(residual: bool, seed: int) -> MultiLayerPool:
        torch.manual_seed(seed)
        return MultiLayerPool(
            encoder.hidden_size, encoder.num_layers, token_pooling="mean", residual=residual, **SIZES
        ).eval()

    print(f"\n{'STS-B Spearman':<32}{'learning rate':>14}{'dev':>18}{'test':>18}")
    starts: dict[str, Callable[[Tensor], Tensor]] = {"mean pooling": lambda x: F.normalize(x[:, -1], dim=-1)}
    starts |= {f"{name}, untrained": as_function(new(residual, 0)) for name, residual in POOLS.items()}
    for name, embed in starts.items():
        print(f"{name:<46}{sts_score(embed, dev):>18.4f}{sts_score(embed, test):>18.4f}")
    for name, residual in POOLS.items():
        trained = {rate: [new(residual, seed) for seed in range(args.seeds)] for rate in LEARNING_RATES}
        scores = {}
        for rate, pools in trained.items():
            for seed, pool in enumerate(pools):
                torch.manual_seed(seed)
                train(pool, queries, positives, rate, args.steps, args.batch)
            scores[rate] = [sts_score(as_function(pool), dev) for pool in pools]
        best = max(scores, key=lambda rate: mean(scores[rate]))
        tested = [sts_score(as_function(pool), test) for pool in trained[best]]
        print(f"{name:<32}{best:>14g}{spread(scores[best]):>18}{spread(tested):>18}", flush=True)


if __name__ == "__main__":
    main()
