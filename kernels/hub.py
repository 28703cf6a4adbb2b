"""The kernels as Hugging Face's `kernels` loads them: a folder for `get_local_kernel`, or for a kernel repository.

    python kernels/hub.py -o build/kernels-hub

    README.md, LICENSE, tests/      the card, the licence, tests of what lies beside them
    build/torch-cpu, -cuda, -rocm   the sources, the same for all, and metadata.json with their digests

Several versions of a kernel may live in one process, each a module of its own name. So each needs names of its own for
its torch ops: `mlpool::pool` is renamed by a digest of the sources. Needs Python alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE, NAME = HERE / "mlpool_kernels", "mlpool-kernels"
# What runs where; PTX of sm_80 is compiled for whatever comes later.
ARCHITECTURES = {"cpu": None, "cuda": ["8.0+PTX"], "rocm": ["gfx942"]}
NAMESPACE = '"mlpool::'  # of an op's name, as it stands in the sources
CARD = f"""---
library_name: kernels
license: apache-2.0
tags:
- kernel
- triton
- sentence-similarity
- embeddings
- pooling
---

```python
from kernels import get_local_kernel

{NAME.replace("-", "_")} = get_local_kernel("THIS FOLDER")  # of a repository: get_kernel("OWNER/{NAME}", version=0)
```

"""


def version() -> str:
    """That of mlpool, of which these are the kernels."""
    found = re.search(r'^__version__ = "(.+)"', (HERE.parent / "mlpool/version.py").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f'{HERE.parent / "mlpool/version.py"} has no line __version__ = "…"')
    return found[1]


def sources() -> dict[str, str]:
    """Name -> text of every source, as it stands in the checkout."""
    return {path.name: path.read_text(encoding="utf8") for path in sorted(PACKAGE.glob("*.py"))}


def renamed(texts: dict[str, str], namespace: str) -> dict[str, str]:
    """The sources with their ops in `namespace`. ValueError where one would stay behind."""
    changed = {name: text.replace(NAMESPACE, f'"{namespace}::') for name, text in texts.items()}
    left = [name for name, text in changed.items() if re.search(r"ops\.mlpool\b|['\"]mlpool::", text)]
    if left or changed == texts:
        raise ValueError(f"ops are registered or called as mlpool's by other words than {NAMESPACE}…: {left or 'all'}")
    return changed


def write_variant(folder: Path, backend: str) -> None:
    """One build variant: the sources and what `kernels` reads before it imports them."""
    texts = sources()
    content = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode()).hexdigest()
    identity = f"_{NAME.replace('-', '_')}_{backend}_{content[:10]}"
    folder.mkdir(parents=True)
    for name, text in renamed(texts, identity).items():
        (folder / name).write_text(text, encoding="utf8")
    digests = {
        path.name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.iterdir())
    }
    archs = {"archs": ARCHITECTURES[backend]} if ARCHITECTURES[backend] else {}
    metadata = {
        "name": NAME, "id": identity, "version": int(version().partition(".")[0]), "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": backend, **archs},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write(output: Path) -> None:
    """The whole folder.

    Raises:
        FileExistsError: it is there and holds something else than an earlier one.
    """
    if output.exists() and not (output / "build/torch-cpu/metadata.json").is_file() and any(output.iterdir()):
        raise FileExistsError(f"{output} is there and holds no kernels of an earlier run; name another folder")
    new = output.with_name(f".{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for backend in ARCHITECTURES:
        write_variant(new / "build" / f"torch-{backend}", backend)
    (new / "README.md").write_text(CARD + (HERE / "README.md").read_text(encoding="utf8"), encoding="utf8")
    shutil.copyfile(HERE.parent / "LICENSE", new / "LICENSE")
    (new / "tests").mkdir()
    shutil.copyfile(HERE / "tests/test_hub.py", new / "tests/test_hub.py")
    if output.exists():
        shutil.rmtree(output)
    new.rename(output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder; one of an earlier run is replaced")
    output = parser.parse_args(argv).output
    try:
        write(output)
    except (ValueError, OSError) as error:
        print(f"hub.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {NAME} {version()} for {', '.join(ARCHITECTURES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
