"""Train pools on real pairs over a frozen base and measure STS: what a pool can read of layers that stay as they are.

    python examples/train_pool.py --data ../shared/data                        all-MiniLM-L6-v2, an encoder
    python examples/train_pool.py --data ../shared/data --base bases/smollm2   a real decoder (make bases), causal

Layer states are taken once, so each pool trains in about a minute on two CPU cores. The learning rate is the one of the
best score on development data (STS-B and SICK-R dev); STS16 and the STS-B and SICK-R tests are read once, at the end.
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

from mlpool import LayerWeightsPool, MultiLayerPool
from mlpool.attention.check import is_encoder
from mlpool.taps import find_layers

SIZES = {"num_latents": 64, "num_heads": 6, "head_dim": 64, "ff_mult": 1}
TEMPERATURE, MAX_LENGTH = 0.05, 96
DEV = ("stsb/dev", "sickr/dev")
TEST = ("stsb/test", "sts16/test", "sickr/test")
Split = tuple[Tensor, Tensor, list[float]]


def pools(
    hidden_size: int, layers: int, token_pooling: str, start: str
) -> dict[str, tuple[Callable[[], torch.nn.Module], tuple]]:  # fmt: skip
    """Name → how to make it, and the learning rates to try."""
    own = {"token_pooling": token_pooling}
    multi = {**SIZES, **own}
    return {
        f"default, from {start}": (
            lambda: MultiLayerPool(hidden_size, layers, start=start, **multi), (3e-4, 1e-3, 3e-3),
        ),
        "residual on the last layer, gate 0": (
            lambda: MultiLayerPool(hidden_size, layers, residual=True, **multi), (1e-4, 3e-4, 1e-3),
        ),
        "released equations, same size": (
            lambda: MultiLayerPool(hidden_size, layers, residual=False, **multi), (1e-4, 3e-4, 1e-3),
        ),
        f"layer weights, from {start}": (
            lambda: LayerWeightsPool(hidden_size, layers, start=start, **own), (3e-3, 1e-2, 3e-2),
        ),
    }  # fmt: skip


def read(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"no data at {path}; pass --data with folders pairs/ and sts/ of JSONL files")
    return [json.loads(line) for line in path.open()]


def pairs(data: Path, count: int) -> tuple[list[str], list[str]]:
    """`count` pairs, evenly from every set."""
    sets = sorted((data / "pairs").glob("*/train.jsonl"))
    rows = [row for path in sets for row in read(path)[: count // len(sets)]]
    return [r["query"] for r in rows], [r["positive"] for r in rows]


def sts_states(encoder: Encoder, path: Path, most: int | None = None) -> Split:
    rows = read(path)[:most]
    left, right = (encoder.encode([r[name] for r in rows]) for name in ("sentence1", "sentence2"))
    return left, right, [r["score"] for r in rows]


@torch.no_grad()
def sts_score(embed: Callable[[Tensor], Tensor], splits: list[Split]) -> float:
    """Spearman correlation of cosine similarity with the human scores, mean over the sets."""
    return mean(float(spearmanr((embed(a) * embed(b)).sum(1), scores).statistic) for a, b, scores in splits)


def as_function(pool: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: pool(layer_states=x)


def spread(scores: list[float]) -> str:
    return f"{mean(scores):.4f}" + (f" ± {stdev(scores):.4f}" if len(scores) > 1 else "")


def train(pool: torch.nn.Module, queries: Tensor, positives: Tensor, rate: float, steps: int, batch: int) -> None:
    """InfoNCE with in-batch negatives; a pool's own learning rates keep their proportion, as in `mlpool train`."""
    own = dict(pool.learning_rates) or {"": 1.0}
    groups = {
        name: {"params": [p], "lr": rate * own[max((k for k in own if name.startswith(k)), key=len)] / own[""]}
        for name, p in pool.named_parameters()
    }
    optimizer = torch.optim.AdamW(groups.values(), weight_decay=0.01)
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


def compare(args: argparse.Namespace, token_pooling: str) -> None:
    encoder = Encoder(args.base, token_pooling, MAX_LENGTH)
    texts = pairs(args.data, args.pairs)
    print(f"layer states ({token_pooling}) of {2 * len(texts[0])} training texts and the STS sets ...", flush=True)
    queries, positives = (encoder.encode(side) for side in texts)
    dev, test = ([sts_states(encoder, args.data / f"sts/{n}.jsonl", args.sts) for n in names] for names in (DEV, TEST))

    print(f"\n{f'Spearman, {token_pooling} of tokens':<46}{'learning rate':>14}{'dev':>18}{'test':>18}")
    starts = {"last layer": lambda x: F.normalize(x[:, -1], dim=-1)}
    starts |= {"average of unit-length layers": lambda x: F.normalize(F.normalize(x, dim=-1).mean(1), dim=-1)}
    for name, embed in starts.items():
        print(f"{name:<60}{sts_score(embed, dev):>18.4f}{sts_score(embed, test):>18.4f}", flush=True)
    start = "last" if is_encoder(*find_layers(encoder.model)) else "all"  # as `mlpool.load` starts them
    for name, (make, rates) in pools(encoder.hidden_size, encoder.num_layers, token_pooling, start).items():
        made: dict[float, list[torch.nn.Module]] = {rate: [] for rate in rates}
        for rate in rates:
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                pool = make().eval()
                if rate == rates[0] and seed == 0:
                    start = sts_score(as_function(pool), dev), sts_score(as_function(pool), test)
                    print(f"{name + ', untrained':<60}{start[0]:>18.4f}{start[1]:>18.4f}", flush=True)
                train(pool, queries, positives, rate, args.steps, args.batch)
                made[rate].append(pool)
        scores = {rate: [sts_score(as_function(pool), dev) for pool in made[rate]] for rate in rates}
        best = max(scores, key=lambda rate: mean(scores[rate]))
        tested = [sts_score(as_function(pool), test) for pool in made[best]]
        print(f"{name:<46}{best:>14g}{spread(scores[best]):>18}{spread(tested):>18}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--base", help="a folder with a model; all-MiniLM-L6-v2 from its wheel if it is left out")
    parser.add_argument("--token-pooling", nargs="+", default=["mean"], choices=["mean", "unit_mean", "last"])
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--sts", type=int, default=10_000, help="the first so many pairs of each STS set")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for token_pooling in args.token_pooling:
        compare(args, token_pooling)


if __name__ == "__main__":
    main()
