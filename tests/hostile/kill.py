"""`make hostile-kill`: kill -9 at random moments of train (full weights, LoRA), fit, encode and study.

    python tests/hostile/kill.py [--kills 20] [--seed 0] [--only train-full train-lora fit encode study]

Each starts again where it was killed, with the same arguments, until it ends; then its results must be those of a run
that nobody disturbed, to the last bit. A run that ended is begun anew until there were enough kills. The moments are
uniform over the time that the undisturbed run took. Tiny random models; each run is a fork of a process that has
imported everything, so that most kills fall into the work and not into imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tiny  # noqa: E402
import torch  # noqa: E402
from made import sentence, write_jsonl  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from mlpool.corpus.embedding_folder import load_embeddings, load_ids  # noqa: E402
from mlpool.corpus.encode import encode_files  # noqa: E402
from mlpool.embedder import load  # noqa: E402
from mlpool.evaluation import evaluate, results  # noqa: E402, F401  (imported before the forks)
from mlpool.fitting import states  # noqa: E402
from mlpool.fitting.fit import fit  # noqa: E402
from mlpool.study import runs, study  # noqa: E402
from mlpool.training.train import train  # noqa: E402

POOLER = {"num_latents": 4, "num_heads": 2, "head_dim": 8}
_LONGEST = 300  # seconds of one start; more is a hang


# --- what is killed: the work, and what counts as its result ----------------------------------------------------------


def train_full(place: Path, out: Path) -> None:
    _train(place, out)


def train_lora(place: Path, out: Path) -> None:
    _train(place, out, lora={"rank": 2, "dropout": 0.1})


def _train(place: Path, out: Path, **changes: Any) -> None:
    config = {
        "model": str(place / "base"), "design": "multi-layer-bidirectional", "pooler": POOLER, "output_dir": str(out),
        "data": {"train": str(place / "pairs.jsonl")}, "per_device_train_batch_size": 8, "max_steps": 8,
        "save_steps": 1, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **changes,
    }  # fmt: skip
    train(config, resume=True)


def weights(place: Path, out: Path) -> str:
    """A digest of every weight of the trained folder, which must load, too."""
    load(out, device="cpu")
    digest = hashlib.sha256()
    for file in sorted([*out.glob("*.safetensors"), *out.glob("1_Pooler/*.safetensors")]):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def fitted(place: Path, out: Path) -> None:
    states.PART = 16  # of 200 texts
    fit({
        "model": str(place / "base"), "design": "multi-layer-bidirectional", "output_dir": str(out), "device": "cpu",
        "data": {"train": str(place / "pairs.jsonl")}, "dev": str(place / "sts/made/dev.jsonl"), "seeds": 3,
        "candidates": [{"pooler": POOLER, "learning_rate": [1e-3, 1e-2]}], "batch_size": 16, "max_steps": 10,
    })  # fmt: skip


def encode(place: Path, out: Path) -> None:
    embedder = load(place / "base", "mean-causal", device="cpu")
    encode_files(embedder, place / "texts.jsonl", out, id_column="key", shard_size=20, progress=False)


def shards(place: Path, out: Path) -> str:
    """A digest of embeddings and ids; nothing else may be left in the folder."""
    names = {path.name for path in out.iterdir()}
    listed = json.loads((out / "manifest.json").read_text())["shards"]
    expected = {"manifest.json", *(s["file"] for s in listed), *(s["ids"] for s in listed)}
    assert names == expected, f"left in the folder: {names ^ expected}"
    ids = json.dumps(load_ids(out)).encode()
    return hashlib.sha256(load_embeddings(out, concatenate=True).tobytes() + ids).hexdigest()


def studied(place: Path, out: Path) -> None:
    study(
        {
            "base": str(place / "base"), "data_dir": str(place), "output": str(out),
            "data": {"train": "pairs.jsonl"}, "seeds": [0, 1],
            "designs": [{"name": f"multi-layer-{way}", "pooler": POOLER} for way in ("causal", "bidirectional")],
            "train": {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "learning_rate": 1e-3},
            "evaluate": {"tasks": ["sts/made"]},
        },
        estimate=False,
    )  # fmt: skip


def scores(place: Path, out: Path) -> str:
    """Every score of the study's results, and the report is there."""
    assert (out / "report.html").is_file()
    rows = [(row.model, row.seed, row.task, row.split, row.score) for row in results.read(out)]
    return json.dumps(sorted(rows, key=str))


KINDS: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path, Path], str]]] = {
    "train-full": (train_full, weights),
    "train-lora": (train_lora, weights),
    "fit": (fitted, weights),
    "encode": (encode, shards),
    "study": (studied, scores),
}


def prepare(place: Path) -> None:
    shutil.copytree(tiny.base("llama"), place / "base")
    rng = random.Random(0)
    write_jsonl(place / "pairs.jsonl", ({"query": sentence(rng), "positive": sentence(rng)} for _ in range(64)))
    write_jsonl(place / "texts.jsonl", ({"text": sentence(rng), "key": f"k{i}"} for i in range(400)))
    pairs = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": rng.random()} for _ in range(40)]
    for split in ("dev", "test"):
        write_jsonl(place / f"sts/made/{split}.jsonl", pairs)


# --- killing ----------------------------------------------------------------------------------------------------------


def start(work: Callable[[Path, Path], None], place: Path, out: Path, log: Path) -> int:
    """A process in a group of its own that does the work; what it says is added to the log."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A study's runs without the seconds of importing everything again.
        runs.context = lambda: multiprocessing.get_context("fork")
        work(place, out)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """Its exit status, negative for a signal; None where it is not over in time."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def kill(child: int) -> None:
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


def disturb(kind: str, place: Path, root: Path, kills: int, rng: random.Random) -> str:
    """Kill it so many times; what came of it in a line.

    Raises:
        AssertionError: a start failed or hung, or a result is another.
    """
    work, result = KINDS[kind]
    log = root / f"{kind}.log"
    began = time.monotonic()
    child = start(work, place, root / f"{kind}-whole", log)
    assert ended(child, _LONGEST) == 0, f"{kind} fails undisturbed: {_last(log)}"
    seconds = time.monotonic() - began
    expected = result(place, root / f"{kind}-whole")
    out, killed, finished = root / kind, 0, 0
    while killed < kills or out.exists():
        child = start(work, place, out, log)
        status = ended(child, rng.uniform(0, seconds) if killed < kills else _LONGEST)
        if status is None:
            kill(child)
            assert killed < kills, f"{kind} hangs after {killed} kills: {_last(log)}"
            killed += 1
            continue
        assert status == 0, f"{kind} fails after {killed} kills (status {status}): {_last(log)}"
        found = result(place, out)
        assert found == expected, f"{kind} gives another result after {killed} kills:\n{found}\n{expected}"
        finished += 1
        shutil.rmtree(out)
    return f"{kind:12} {killed} kills, {finished} runs finished, all equal to the undisturbed one ({seconds:.1f} s)"


def _last(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-25:])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each kind; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    args = parser.parse_args(words)
    torch.set_num_threads(1)  # threads do not live through a fork
    with tempfile.TemporaryDirectory(prefix="mlpool-kill-") as folder:
        root = Path(folder)
        (root / "given").mkdir()
        prepare(root / "given")
        for kind in args.only:
            print(disturb(kind, root / "given", root, args.kills, random.Random(f"{args.seed} {kind}")), flush=True)


if __name__ == "__main__":
    main()
