"""What every design costs on one base, encoding and training with LoRA (rank 16), beside mean pooling.

    OMP_NUM_THREADS=1 python benchmarks/designs.py --base bases/smollm2 --name smollm2 --data small

Timed as in depth.py: in turns in one process, medians, the processor's time where there is one thread. The numbers go
to benchmarks/results/costs-cpu-1core.csv, and `make plots` brings them into docs/designs.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from depth import read, speeds, table

import mlpool
from mlpool.embedder import DESIGNS
from mlpool.files import write_csv
from mlpool.version import versions

BASELINE, RELEASED = "mean-causal", "multi-layer-causal-mean, released"
# As the tables of scores have it: the paper's equations at the size of a default pool.
POOLS = {RELEASED: {"num_latents": 16, "num_heads": 8, "head_dim": 64, "ff_mult": 1, "residual": False}}
RESULTS = Path(__file__).parent / "results" / "costs-cpu-1core.csv"
COLUMNS = (
    "base", "design", "parameters", "encode_texts_per_s", "train_texts_per_s", "texts", "pairs", "tokens", "rounds",
    "threads", "mlpool", "torch", "transformers", "date",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder with a decoder")
    parser.add_argument("--name", required=True, help="what the tables call it")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--design", nargs="+", default=[*DESIGNS, RELEASED], help="beside mean-causal")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--tokens", type=int, default=32, help="texts are cut there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = read(args.data / "pairs/squad_sentences/train.jsonl", max(args.texts, args.pairs))
    names = dict.fromkeys([BASELINE, *args.design])
    makers = {
        name: partial(
            mlpool.load, args.base, name.partition(",")[0], POOLS.get(name, "default"), max_seq_length=args.tokens
        )
        for name in names
    }
    found = speeds(makers, rows, args)
    print(table(found, "design"))
    taken = (args.texts, args.pairs, args.tokens, args.rounds, torch.get_num_threads())
    now = (*(versions(package)[package] for package in ("mlpool", "torch", "transformers")), f"{datetime.now(UTC):%F}")
    lines = [
        [args.name, name, speed.parameters, f"{speed.encode:.4g}", f"{speed.train:.4g}", *taken, *now]
        for name, speed in found.items()
    ]
    write_csv(args.results, COLUMNS, lines)
    print(f"{len(lines)} designs in {args.results}")


if __name__ == "__main__":
    main()
