"""What a step of `mlpool fit` costs beside one of `mlpool train`, and what taking the layer states costs before.

    python benchmarks/fit.py --base bases/smollm2 --pairs 96

The same pool, the same pairs, the same loss: on kept states, and through the base with LoRA (rank 16), in turns, round
by round in one process; medians. Taking states is timed on the same texts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from depth import DESIGN, POOL, Step, in_turns, read, seconds

import mlpool
from mlpool.fitting.states import take_states
from mlpool.fitting.trials import PoolOnStates
from mlpool.show import aligned
from mlpool.training.losses import InfoNCE


def step_on_states(embedder: Any, states: Any, count: int) -> Any:
    """A step over `count` pairs, whose anchors are the first rows of the states and whose positives the next."""
    model = PoolOnStates(embedder[1].pool, states, embedder.device).train()
    loss = InfoNCE(model, cached=False, mini_batch_tokens=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    columns = [torch.arange(count)[:, None] + side * count for side in (0, 1)]

    def step() -> None:
        loss([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in columns]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder with a decoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=96, help="a step")
    parser.add_argument("--tokens", type=int, default=64, help="texts are cut there")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = read(args.data / "pairs/squad_sentences/train.jsonl", 4 * args.pairs)
    rows = list({row["positive"]: row for row in rows}.values())[: args.pairs]  # a question's sentence once
    embedder = mlpool.load(args.base, DESIGN, POOL, max_seq_length=args.tokens)
    texts = [("", row[side]) for side in ("query", "positive") for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Any] = []
        taking = seconds(lambda: kept.append(take_states(embedder, texts, Path(folder) / "states")))
        due = {"fit": step_on_states(embedder, kept[0], len(rows))}
        due["train"] = Step(mlpool.load(args.base, DESIGN, POOL, max_seq_length=args.tokens), rows)
        times = in_turns(due, args.rounds)
    fit, train = (median(times[name]) for name in ("fit", "train"))
    lines = [["taking states, once", f"{taking:.2f}", ""], ["train", f"{train:.2f}", "1.0x"]]
    lines.append(["fit", f"{fit:.3f}", f"{train / fit:.1f}x"])
    print(aligned([f"{len(rows)} pairs", "seconds", "cheaper"], lines))
    print(f"{args.rounds} rounds, {torch.get_num_threads()} threads, texts cut at {args.tokens} tokens")


if __name__ == "__main__":
    main()
