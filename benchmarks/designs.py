"""What every design costs on one base, encoding and training with LoRA (rank 16), beside mean pooling.

    python benchmarks/designs.py --base bases/smollm2 --name smollm2 --data small

Timed as in depth.py: in turns in one process, medians; on one thread, by the processor's time. The numbers go to
benchmarks/results/costs-cpu-1core.csv in place of those of the same base and design, and `make plots` brings them into
docs/designs.md.
"""

from __future__ import annotations

import argparse
import csv
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
POOLS = {RELEASED: {"residual": False}}  # at the size of a default pool, as in the tables of scores
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
    torch.set_num_threads(1)
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
    now = (*versions("mlpool", "torch", "transformers").values(), f"{datetime.now(UTC):%F}")
    lines = {}
    if args.results.is_file():
        with args.results.open(newline="", encoding="utf8") as file:
            lines = {(line["base"], line["design"]): list(line.values()) for line in csv.DictReader(file)}
    for name, (encode, train, parameters) in found.items():
        lines[args.name, name] = [args.name, name, parameters, f"{encode:.4g}", f"{train:.4g}", *taken, *now]
    write_csv(args.results, COLUMNS, lines.values())
    print(f"{len(found)} designs in {args.results}")


if __name__ == "__main__":
    main()
