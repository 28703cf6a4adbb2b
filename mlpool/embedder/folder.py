"""The folder of a saved embedder: written whole before anything in it is replaced, and checked before it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "mlpool.json"
_SAVING, _SAVED = ".mlpool-saving-", ".mlpool-saved"  # being written; complete, on its way to its place
_FILES = ".files"  # in _SAVED: the names of all its files
_FIRST = ("config_sentence_transformers.json", "modules.json")  # these lead a reader to `check_folder`
_READ_WHOLE = 2**28  # bytes; of larger files only the size is compared when loading


@contextlib.contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A new folder inside `folder` to write into; its files take their places when the block ends without an error.

    Until then `folder` stays as it was, whatever happens. It changes by one rename, and what a kill leaves undone after
    that is done by the next `recover` or `check_folder`. Files that no embedder wrote (a trainer's checkpoints and
    states) are not touched, and the folder itself is not replaced: it may be a mount point or somebody's current one.

    Raises:
        NotADirectoryError: `folder` is a file. ValueError: its manifest is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pass a folder to save into")
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    read_manifest(folder)
    stage = folder / f"{_SAVING}{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        names = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
        (stage / _FILES).write_text(json.dumps(names), encoding="utf8")
        stage.rename(folder / _SAVED)
        recover(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def recover(folder: str | Path) -> None:
    """Put right what a save that was killed left in `folder`: what was complete is moved into place, the rest deleted.

    Several processes may do so at once.
    """
    folder = Path(folder)
    saved = folder / _SAVED
    if (saved / _FILES).is_file():
        new = json.loads((saved / _FILES).read_text(encoding="utf8"))
        for name in read_manifest(folder).get("files", {}).keys() - set(new):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: (name == MANIFEST, name not in _FIRST)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved already
                (saved / name).replace(folder / name)
        (saved / _FILES).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)
    for stage in folder.glob(f"{_SAVING}*"):
        shutil.rmtree(stage, ignore_errors=True)


def write_manifest(folder: Path, **entries: Any) -> None:
    """Write `mlpool.json`: every file with its size, the weights also with their SHA-256, and `entries`."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size}
            if path.suffix == ".safetensors":
                files[name]["sha256"] = _sha256(path)
    (folder / MANIFEST).write_text(json.dumps({**entries, "files": files}, indent=2) + "\n", encoding="utf8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, {} where there is none; ValueError if it is damaged."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); delete it, or copy the folder again") from error


def check_folder(folder: str | Path, whole: bool = False) -> None:
    """Complete what a killed save left, and compare a folder with its manifest. Text may have been edited, weights not.

    Args:
        whole: also hash files above 256 MiB.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged. Both name it.
    """
    folder = Path(folder)
    if (folder / _SAVED).is_dir():
        recover(folder)
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
