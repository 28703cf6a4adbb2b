"""What a cut model saves, and what its top should be: a base at some depths, encoding, training and read untrained.

    python benchmarks/depth.py --base bases/smollm2 --depth 10 18 --sts 300
    python benchmarks/depth.py --base bases/smollm2 --depth 18 --rounds 5 --sts 0          speeds alone

The whole model and the cut ones are timed in turns, round by round, in one process; the medians are printed, with one
thread (OMP_NUM_THREADS=1) of the processor's time, otherwise of the wall clock's. Encoding:
texts of squad_sentences through a pool of all kept layers. Training: a step of LoRA (rank 16), InfoNCE over pairs, the
optimizer's step included. Read untrained: Spearman on the first --sts pairs of STS-B dev, STS16 test and SICK-R dev
(draw them first: examples/small_data.py), mean of them, of layer k alone: its raw mean, each of its tokens at unit
length first, and the mean of its tokens behind the base's final norm, which is what `mean-causal` reads of a cut model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import mlpool
from mlpool import gather
from mlpool.show import aligned, progress
from mlpool.taps import find_layers
from mlpool.training.losses import InfoNCE
from mlpool.training.trainer import prepare

STS = ("stsb/dev", "sts16/test", "sickr/dev")
DESIGN, POOL = "multi-layer-causal-mean", {"num_latents": 64, "num_heads": 8, "head_dim": 64}


def read(path: Path, most: int) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"no data at {path}; pass --data with folders pairs/ and sts/ of JSONL files")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(most), strict=False)]


def seconds(run: Any) -> float:
    """With one thread the processor's time: others may be at work on this machine."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


def in_turns(due: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; a round before them does what only a first call does."""
    times: dict[str, list[float]] = {name: [] for name in due}
    with progress("steps", "step", len(due) * (rounds + 1)) as bar:
        for turn in range(rounds + 1):
            for name, step in due.items():
                took = seconds(step)
                times[name] += [took] if turn else []
                bar.update()
    return times


class Step:
    """One step of training an embedder with LoRA: pairs in, the optimizer's step made."""

    def __init__(self, embedder: mlpool.Embedder, pairs: list[dict]) -> None:
        self.embedder = mlpool.add_lora(embedder)
        prepare(self.embedder)
        self.embedder.train()
        self.loss = InfoNCE(self.embedder)
        self.columns = [[row[side] for row in pairs] for side in ("query", "positive")]
        weights = [p for p in self.embedder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-5)

    def __call__(self) -> None:
        self.loss([self.embedder.preprocess(texts) for texts in self.columns]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Speed(NamedTuple):
    """Texts a second; a pair is two."""

    encode: float
    train: float
    parameters: int


def speeds(makers: Mapping[str, Callable[[], mlpool.Embedder]], rows: list[dict], args: Any) -> dict[str, Speed]:
    """Of each embedder that is made, by medians; args: texts, pairs, rounds."""
    texts, pairs = [row["positive"] for row in rows[: args.texts]], rows[: args.pairs]
    encoders = {name: make() for name, make in makers.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in encoders.items()}
    encode = in_turns({name: lambda m=m: m.encode(texts) for name, m in encoders.items()}, args.rounds)
    encoders.clear()  # all at once would be twice the memory
    train = in_turns({name: Step(make(), pairs) for name, make in makers.items()}, args.rounds)
    return {
        name: Speed(len(texts) / median(encode[name]), 2 * len(pairs) / median(train[name]), sizes[name])
        for name in makers
    }


def table(found: Mapping[str, Speed], heading: str) -> str:
    """Against the first of them."""
    first, lines = next(iter(found.values())), []
    for name, (encode, train, parameters) in found.items():
        ratios = f"{encode / first.encode:.2f}x", f"{train / first.train:.2f}x"
        lines.append([name, f"{parameters / 1e6:.1f}", f"{encode:.2f}", ratios[0], f"{train:.2f}", ratios[1]])
    return aligned([heading, "M parameters", "encode texts/s", "", "train texts/s", ""], lines)


@torch.no_grad()
def scores(args: argparse.Namespace, depths: list[int]) -> None:
    """Three readings of each layer from one pass of the whole model; the last is held against a model that is cut."""
    sets = [read(args.data / f"sts/{name}.jsonl", args.sts) for name in STS]
    texts = list(dict.fromkeys(row[side] for rows in sets for row in rows for side in ("sentence1", "sentence2")))
    model = mlpool.load(args.base, "mean-causal", packing="never", max_seq_length=args.tokens)
    trunk, layers = find_layers(model[0].model)  # type: ignore[arg-type]
    norm: Any = next(module for name, module in trunk.named_children() if "norm" in name or name == "ln_f")
    states: dict[int, torch.Tensor] = {}
    for k in depths:
        layers[k - 1].register_forward_hook(lambda module, args, out, k=k: states.__setitem__(k, first_of(out)))
    kinds = {"raw mean": lambda x: x, "unit tokens": lambda x: F.normalize(x, dim=-1), "final norm": norm}
    rows: dict[tuple[int, str], list[torch.Tensor]] = {(k, kind): [] for k in depths for kind in kinds}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in progress("read", "batch", iterable=range(0, len(texts), 16)):
        features = model.preprocess([texts[i] for i in order[start : start + 16]])
        model[0](features)
        for (k, kind), found in rows.items():
            found.append(gather([kinds[kind](states[k])], features["attention_mask"], token_pooling="mean")[:, 0])
    place = {texts[i]: at for at, i in enumerate(order)}
    units = {key: F.normalize(torch.cat(found), dim=-1) for key, found in rows.items()}
    cut = mlpool.load(args.base, "mean-causal", depth=depths[-1], max_seq_length=args.tokens)
    own = cut.encode(texts[:4], convert_to_tensor=True)
    torch.testing.assert_close(
        own, units[depths[-1], "final norm"][[place[text] for text in texts[:4]]], atol=1e-5, rtol=0
    )

    def score(unit: torch.Tensor) -> float:
        found = []
        for lines in sets:
            one, two = (unit[[place[line[side]] for line in lines]] for side in ("sentence1", "sentence2"))
            found.append(float(spearmanr((one * two).sum(1), [line["score"] for line in lines]).statistic))
        return mean(found)

    lines = [[f"{k} of {len(layers)}", *(f"{score(units[k, kind]):.4f}" for kind in kinds)] for k in depths]
    print(aligned(["top layer", *kinds], lines))
    print(f"Spearman, untrained, causal, mean of {', '.join(STS)}, the first {args.sts} pairs of each")


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a folder with a decoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--depth", type=int, nargs="+", help="layers to keep (default: 0.6 of them)")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="texts are cut there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sts", type=int, default=300, help="pairs of each STS set; 0: no scores")
    args = parser.parse_args()
    whole = json.loads((Path(args.base) / "config.json").read_text())["num_hidden_layers"]
    depths = [whole, *(k for k in args.depth or [int(0.6 * whole)] if k != whole)]
    if args.rounds:
        makers = {
            f"{k} of {whole}": partial(mlpool.load, args.base, DESIGN, POOL, depth=k, max_seq_length=args.tokens)
            for k in depths
        }
        rows = read(args.data / "pairs/squad_sentences/train.jsonl", max(args.texts, args.pairs))
        print(table(speeds(makers, rows, args), "layers"))
        print(f"{args.texts} texts, {args.pairs} pairs a step, {args.rounds} rounds, {torch.get_num_threads()} threads")
    if args.sts:
        scores(args, depths)


if __name__ == "__main__":
    main()
