"""Pools trained alone over a frozen base, all by one recipe: what can be read of layers that stay as they are.

    python examples/train_pool.py bases/smollm2 --data ../shared/data          a real decoder (make bases), causal
    python examples/train_pool.py minilm --data ../shared/data --design multi-layer-bidirectional

One `mlpool fit`: layer states are taken once, each pool trains on them in minutes, and a killed run goes on. The
learning rate of a pool is to be chosen by dev; test decides nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import minilm
from small_data import draw, read, write

from mlpool.fitting.fit import fit

SIZES = {"num_latents": 16, "num_heads": 8, "head_dim": 64, "ff_mult": 1}
DEV = ("stsb/dev", "sickr/dev")
TEST = ("stsb/test", "sts16/test", "sickr/test")
CANDIDATES = [
    {"name": "default", "pooler": SIZES, "learning_rate": [1e-3, 5e-3]},
    {"name": "not whitened, from all layers", "pooler": {**SIZES, "start": "all"}, "learning_rate": [1e-3, 2e-3]},
    {"name": "not whitened, from the last", "pooler": {**SIZES, "start": "last"}, "learning_rate": [3e-4, 1e-3]},
    {"name": "released equations", "pooler": {**SIZES, "residual": False}, "learning_rate": [3e-4, 1e-3]},
    {"name": "gated residual", "pooler": {**SIZES, "residual": True}, "learning_rate": [1e-3]},
    {"name": "layer weights", "pool": "LayerWeightsPool", "pooler": {"start": "all"}, "learning_rate": [1e-2]},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help='a folder with a model, or "minilm" for all-MiniLM-L6-v2 from its wheel')
    parser.add_argument("--data", type=Path, required=True, help="a folder with pairs/ and sts/ of JSONL files")
    parser.add_argument("--design", default="multi-layer-causal-mean")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/train-pool"))
    parser.add_argument("--pairs", type=int, default=1350, help="of all sets together, the same number of each")
    parser.add_argument("--rows", type=int, default=400, help="of each STS set")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()

    sets = sorted((args.data / "pairs").glob("*/train.jsonl"))
    pairs = [row for path in sets for row in draw(read(path), args.pairs // len(sets))]
    write(args.output / "pairs.jsonl", [{"query": row["query"], "positive": row["positive"]} for row in pairs])
    for name in (*DEV, *TEST):
        write(args.output / f"{name}.jsonl", draw(read(args.data / f"sts/{name}.jsonl"), args.rows))
    fit({
        "model": str(minilm.folder() if args.base == "minilm" else args.base), "design": args.design,
        "max_seq_length": 96, "data": str(args.output / "pairs.jsonl"), "output_dir": str(args.output / "best"),
        "dev": [str(args.output / f"{name}.jsonl") for name in DEV],
        "test": [str(args.output / f"{name}.jsonl") for name in TEST],
        "candidates": CANDIDATES, "seeds": args.seeds, "batch_size": args.batch, "max_steps": args.steps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
