"""The folder of a saved embedder: written beside its place and moved there whole, and checked before it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "mlpool.json"
_READ_WHOLE = 2**28  # bytes; of larger files only the size is compared when loading


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends without an error.

    Until then `folder` stays as it was, whatever happens. Files in it that no embedder wrote (a trainer's optimizer
    state) are kept.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pass a folder to save into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f".{folder.name}.saving-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    stage = folder.parent / f".{folder.name}.saving-{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        _replace(folder, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(folder: Path, stage: Path) -> None:
    if not folder.exists():
        stage.rename(folder)
        return
    old = folder.parent / f".{folder.name}.before-{os.getpid()}"
    written = set(read_manifest(folder).get("files", {})) if (folder / MANIFEST).is_file() else set()
    folder.rename(old)
    try:
        stage.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if path.is_file() and str(name) not in written and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder / name)
    shutil.rmtree(old)


def write_manifest(folder: Path, **entries: Any) -> None:
    """Write `mlpool.json`: every file with its size, the weights also with their SHA-256, and `entries`."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size}
            if path.suffix == ".safetensors":
                files[name]["sha256"] = _sha256(path)
    (folder / MANIFEST).write_text(json.dumps({**entries, "files": files}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote; ValueError if it is damaged."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error


def check_folder(folder: str | Path, whole: bool = False) -> None:
    """Compare a folder with its manifest. Text files may have been edited, weights not.

    Args:
        whole: also hash files above 256 MiB.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged. Both name it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return
    advice = "copy the folder again from where it was saved"
    for name, entry in read_manifest(folder).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            if path.suffix == ".md":
                continue
            raise FileNotFoundError(f"{folder} lacks {name}, which was saved with it; {advice}")
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is no valid JSON ({error}); {advice}") from error
        elif "sha256" in entry:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{path} has {size} bytes, {entry['bytes']} were saved; {advice}")
            if (whole or size <= _READ_WHOLE) and _sha256(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was saved; {advice}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
