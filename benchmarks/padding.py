"""What padding costs a training step: packed, and padded, on texts of mixed lengths.

    OMP_NUM_THREADS=1 python benchmarks/padding.py --base bases/smollm2 --pairs 16 --tokens 256

Half of the pairs are of squad_sentences, whose texts are short, half of medquad, whose answers are long; LoRA (rank 16)
on every token's mean, InfoNCE, the optimizer's step included; in turns, round by round in one process; medians, of the
processor's time with one thread. "collated" is what the collator makes of each column: as many tokens as its longest
text has for each. "seen by a layer" is counted where the first layer's feed-forward runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from depth import in_turns, read

import mlpool
from mlpool.show import aligned
from mlpool.taps import find_layers
from mlpool.training.losses import InfoNCE
from mlpool.training.trainer import prepare


class Step:
    """A training step that notes what the first layer's feed-forward sees on the way forward."""

    def __init__(self, args: argparse.Namespace, packing: str, columns: list[list[str]]) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"depth": args.depth or "auto", "max_seq_length": args.tokens, "packing": packing}
        self.embedder = mlpool.add_lora(mlpool.load(args.base, "mean-causal", **options))
        prepare(self.embedder)
        self.embedder.train()
        self.columns = [self.embedder.preprocess(texts) for texts in columns]
        self.loss = InfoNCE(self.embedder, cached=False, mini_batch_tokens=args.budget)
        self.optimizer = torch.optim.AdamW([p for p in self.embedder.parameters() if p.requires_grad], lr=1e-5)
        self.seen = 0
        first: Any = find_layers(self.embedder[0].model)[1][0]  # type: ignore[arg-type]
        first.mlp.register_forward_hook(self._note)

    def _note(self, *call: Any) -> None:
        self.seen += call[-1].shape[:-1].numel()

    def __call__(self) -> None:
        self.loss(self.columns).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder with a decoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--tokens", type=int, default=256, help="texts are cut there")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a mini-batch")
    parser.add_argument("--depth", type=int, help="layers that are kept (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    half = args.pairs // 2
    rows = [
        row for name in ("squad_sentences", "medquad") for row in read(args.data / f"pairs/{name}/train.jsonl", half)
    ]
    steps = {way: Step(args, way, [[row[side] for row in rows] for side in ("query", "positive")])
             for way in ("always", "never")}  # fmt: skip
    times = in_turns(steps, args.rounds)
    lines = []
    for way, step in steps.items():
        counts, calls = step.loss.counts, args.rounds + 1
        took = median(times[way]) if times[way] else float("nan")
        lines.append([
            {"always": "packed", "never": "padded"}[way], f"{counts.text // calls:,}",
            f"{sum(column['input_ids'].numel() for column in step.columns):,}", f"{step.seen // calls:,}",
            f"{counts.computed / counts.text:.2f}", f"{took:.2f}", f"{2 * len(rows) / took:.2f}",
        ])  # fmt: skip
    head = [
        f"{len(rows)} pairs",
        "tokens of text",
        "collated",
        "seen by a layer",
        "computed / text",
        "seconds",
        "texts/s",
    ]
    print(aligned(head, lines))
    print(f"{args.rounds} rounds, {torch.get_num_threads()} threads, cut at {args.tokens} tokens")


if __name__ == "__main__":
    main()
