"""Are the wheels what a user needs? Installed into a fresh environment, and README's first code and commands run there.

    python .ci/release.py WHEELS ENVIRONMENT [-- options of pip]

Only the checkout's configs and examples are used, never its packages: everything runs outside of it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "Qwen/Qwen3-0.6B-Base"  # README's, as a tiny random one of its family
TINY = """
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

folder = Path({model!r})
folder.mkdir(parents=True)
sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=32)
heads = dict(num_attention_heads=2, num_key_value_heads=1)
Qwen3Model(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
words = Tokenizer(models.WordLevel({{w: i for i, w in enumerate(["<unk>", "</s>", *map(str, range(290))])}}, "<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
"""


def check_contents(wheel: Path) -> set[str]:
    """Every file of the packages is in the wheel, templates too, and nothing else of the checkout; the packages."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    places = {"mlpool": ROOT / "mlpool", "mlpool_kernels": ROOT / "kernels" / "mlpool_kernels"}
    of = {name: folder for name, folder in places.items() if any(one.startswith(f"{name}/") for one in inside)}
    wanted = {
        f"{name}/{path.relative_to(f).as_posix()}"
        for name, f in of.items()
        for path in f.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if missing := sorted(wanted - inside):
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}; setup.cfg lists the packages")
    if foreign := sorted(inside - wanted):
        raise SystemExit(f"{wheel.name} holds {', '.join(foreign)}, which is no part of it")
    return set(of)


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf8"), re.M | re.S)


def run(*command: str | Path, place: Path) -> None:
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=place, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("pip", nargs="*")
    args = parser.parse_args()
    wheels = sorted(args.wheels.resolve().glob("*.whl"))
    if not any(wheel.name.startswith("mlpool-") for wheel in wheels):
        raise SystemExit(f"{args.wheels} holds no wheel of mlpool: make release-check builds it")
    packages = {wheel: check_contents(wheel) for wheel in wheels}
    ours = next(wheel for wheel in wheels if wheel.name.startswith("mlpool-"))
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "mlpool/version.py").read_text(), re.M)[1]
    if not all(f"-{version}-" in wheel.name for wheel in wheels):
        raise SystemExit(f"{', '.join(w.name for w in wheels)}: expected version {version}, of mlpool/version.py")
    if f"## {version} - " not in (ROOT / "CHANGELOG.md").read_text(encoding="utf8"):
        raise SystemExit(f"CHANGELOG.md has no heading of version {version} with its date")
    environment = args.environment.resolve()
    venv.create(environment, clear=True, with_pip=True)
    python, mlpool = environment / "bin/python", environment / "bin/mlpool"
    options = [str(ROOT / word) if (ROOT / word).is_file() else word for word in args.pip]
    # The kernels' own wheel only where ours does not hold them: of two wheels with one file the later overwrites it.
    wanted = [f"{ours}[train]", *(wheel for wheel in wheels if not packages[wheel] & packages[ours])]
    run(python, "-m", "pip", "install", "-q", *options, *wanted, place=environment)
    place = environment / "user"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rows = [{"query": f"{i} {i + 1}", "positive": f"{i + 1} {i}"} for i in range(16)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "texts.txt").write_text("".join(f"{i} {i * i % 290} {290 - i}\n" for i in range(1, 290)))
    run(python, "-c", TINY.format(model=MODEL), place=place)
    (place / "readme.py").write_text("\n".join(readme_blocks()))
    run(python, "readme.py", place=place)
    run(mlpool, "--version", place=place)
    run(mlpool, "init", MODEL, "pairs.jsonl", "-o", "train.yaml", place=place)
    run(mlpool, "train", "train.yaml", "--output_dir", "again", "--max_steps", "1", "--save_steps", "1", place=place)
    run(mlpool, "encode", "texts.txt", "-o", "out", "--model", "my-embedder", place=place)
    print(f"{', '.join(w.name for w in wheels)}: installed, and README runs")


if __name__ == "__main__":
    sys.exit(main())
