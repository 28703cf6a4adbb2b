"""The whole way of a user on a real decoder, each step by the command line: nothing on it may fail or drift.

    python examples/bases.py smollm2
    python examples/journey.py --base bases/smollm2 --data ../shared/data -o journey

load and encode, layers, train (LoRA, a few steps), eval, compare with the untrained, merge, export to a plain folder
and to one file of torch.export, and a fresh process that reads each of them. Every form of the trained embedder is
compared with the embedder that was trained: no further off than twice what its own precision puts it off float64, and
the rounding of a unit vector. Prints a line a step with its seconds, and ends with an error where something is not so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import mlpool

TEXTS = (
    "How many layers does the pool read?", "All of them.", "Zürich, 東京, naïve 🙂", "", "word " * 40,
    "Two men are playing chess in the park.", "A man plays the guitar on stage.", "x",
)  # fmt: skip
FLOOR = 1e-5  # of a coordinate of a unit vector in float32
READ = """
import json, sys
import numpy as np
kind, path, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if kind == "mlpool":
    import mlpool
    rows = mlpool.load(path, device="cpu").encode(texts)
elif kind == "sentence-transformers":
    from sentence_transformers import SentenceTransformer
    sys.modules["mlpool"] = None
    rows = SentenceTransformer(path, device="cpu", local_files_only=True).encode(texts)
elif kind == "torch":
    for name in ("mlpool", "mlpool_kernels", "transformers", "sentence_transformers"):
        sys.modules[name] = None  # torch alone: importing one of these is an error
    import torch
    program = torch.export.load(path).module()
    rows = np.concatenate([program(*(torch.tensor([row]) for row in pair)).detach().numpy() for pair in texts])
np.save(sys.argv[4], rows)
"""


class Journey:
    def __init__(self, base: Path, data: Path, output: Path, steps: int, limit: int) -> None:
        self.base, self.data, self.output, self.steps, self.limit = base, data, output, steps, limit
        self.failed: list[str] = []
        output.mkdir(parents=True, exist_ok=True)

    def command(self, *words: object) -> float:
        """Run `mlpool WORDS`; seconds. Its output goes to a file of its name."""
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mlpool.cli", *map(str, words)], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        (self.output / f"{words[0]}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"mlpool {' '.join(map(str, words))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        print(f"{words[0]:<10} {seconds:7.1f} s  {(done.stdout.strip().splitlines() or [''])[-1][:90]}", flush=True)
        return seconds

    def read(self, kind: str, path: Path, texts: object) -> np.ndarray:
        """Embeddings by a fresh process."""
        target = self.output / "read.npy"
        subprocess.run([sys.executable, "-c", READ, kind, str(path), json.dumps(texts), str(target)], check=True)
        return np.load(target)

    def check(self, what: str, found: np.ndarray, exact: np.ndarray, ours: np.ndarray) -> None:
        error, own = np.abs(found - exact).max(), np.abs(ours - exact).max()
        limit = 2 * own + FLOOR
        verdict = "ok" if error <= limit else "WRONG"
        print(f"{what:<34} off float64 by {error:.1e} (embedder {own:.1e}, at most {limit:.1e}): {verdict}", flush=True)
        if not error <= limit:
            self.failed.append(what)

    def run(self) -> None:
        out, pairs = self.output, self.data / "sts/stsb/dev.jsonl"
        self.command("layers", self.base, "--pairs", pairs, "--limit", self.limit, "-o", out / "layers")
        for design, name in (("multi-layer-bidirectional", "trained"), ("mean-causal", "plain")):
            steps = self.steps if name == "trained" else 2
            self.command(
                "train", self.config(design, steps), "--model", self.base, "--output_dir", out / name,
            )  # fmt: skip
            self.forms(out / name, name)
        self.evaluate()
        if self.failed:
            raise SystemExit(f"further off than the precision accounts for: {', '.join(self.failed)}")

    def config(self, design: str, steps: int) -> Path:
        path = self.output / f"{design}.json"  # JSON is YAML
        path.write_text(json.dumps({
            "model": str(self.base), "design": design, "output_dir": "", "max_seq_length": 32, "max_steps": steps,
            "per_device_train_batch_size": 4, "learning_rate": 1e-4, "save_strategy": "no", "seed": 1,
            "lora": {"rank": 8, "alpha": 16}, "data": {"train": str(self.data / "pairs/squad_sentences/train.jsonl")},
            "loss": {"temperature": 0.05},
        }))  # fmt: skip
        return path

    def forms(self, folder: Path, name: str) -> None:
        """Merge and export, and read each form in a fresh process."""
        trained = mlpool.load(folder, device="cpu")
        with torch.no_grad():
            ours = trained.encode(list(TEXTS))
            with trained.in_float64():
                exact = trained.encode(list(TEXTS))
        self.check(f"{name}: reloaded, fresh process", self.read("mlpool", folder, TEXTS), exact, ours)
        self.command("merge", folder, "-o", self.output / f"{name}-merged", "--device", "cpu")
        self.check(f"{name}: merged", self.read("mlpool", self.output / f"{name}-merged", TEXTS), exact, ours)
        program = self.output / f"{name}.pt2"
        self.command("export", folder, "-o", program, "--format", "torch", "--device", "cpu")
        ids = [[part.tolist() for part in row.values()] for row in self.rows(trained)]
        pairs = [[row[0][0], row[1][0]] for row in ids]
        self.check(f"{name}: torch.export, torch alone", self.read("torch", program, pairs), exact, ours)
        if name == "plain":
            self.command("export", folder, "-o", self.output / "plain-st", "--format", "st", "--device", "cpu")
            found = self.read("sentence-transformers", self.output / "plain-st", TEXTS)
            self.check("plain: sentence-transformers alone", found, exact, ours)

    @staticmethod
    def rows(embedder: mlpool.Embedder) -> list[dict[str, torch.Tensor]]:
        """Each text's ids as the embedder frames them, alone, so that nothing is padded."""
        backbone = embedder[0]
        return [backbone.preprocess([text]) for text in TEXTS]

    def evaluate(self) -> None:
        data = self.output / "data/sts/stsb"
        data.mkdir(parents=True, exist_ok=True)
        lines = (self.data / "sts/stsb/dev.jsonl").read_text().splitlines()[: self.limit]
        (data / "test.jsonl").write_text("\n".join(lines) + "\n")
        for name in ("trained-merged", "plain-merged"):
            self.command(
                "eval", self.output / name, "--local", self.output / "data", "-o", self.output / f"results/{name}"
            )  # fmt: skip
        results = [self.output / f"results/{name}" for name in ("plain-merged", "trained-merged")]
        self.command("compare", *results, "-o", self.output / "comparison")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("bases/smollm2"), help="made by examples/bases.py")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with pairs/ and sts/stsb/")
    parser.add_argument("-o", "--output", type=Path, default=Path("journey"), help="a new folder")
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--limit", type=int, default=50, help="pairs that are scored, and whose layers are looked at")
    args = parser.parse_args()
    if not (args.base / "config.json").is_file():
        raise SystemExit(f"no model in {args.base}; make one: python examples/bases.py smollm2")
    if args.output.exists():
        raise SystemExit(f"{args.output} is there; name a new folder (-o)")
    Journey(args.base, args.data, args.output, args.steps, args.limit).run()


if __name__ == "__main__":
    main()
