"""The folder of a saved embedder: written whole before anything in it is replaced, and checked before it is read."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import check_folder_name, confined, flush, parse_json, read_json, sha256, write_json
from ..schema import check

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
        NotADirectoryError: `folder` is a file. FileNotFoundError: it is a link to nothing. ValueError: its manifest is
        damaged, or names files outside of the folder.
    """
    folder = Path(folder)
    check_folder_name(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    stage = folder / f"{_SAVING}{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        names = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
        _moves(folder, names, stage)  # what cannot be put in place is found while the old files are all there
        (stage / _FILES).write_text(json.dumps(names), encoding="utf8")
        for name in (*names, _FILES, "."):
            flush(stage / name)
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

    Raises:
        ValueError: what tells how to go on is damaged or leads out of the folder; then nothing was touched.
    """
    folder = Path(folder)
    saved = folder / _SAVED
    old = set(read_manifest(folder).get("files", ()))
    if saved.is_symlink():
        raise ValueError(f"{saved} is a link, expected a folder that a save left; delete it")
    if (saved / _FILES).is_file():
        names = read_json(saved / _FILES, list, f"a save left {saved}; delete it to keep what else is in {folder}")
        moves = _moves(folder, names, saved)
        for name in old - set(names):
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
        for path, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved already
                path.replace(place)
        flush(folder)
        (saved / _FILES).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)
    for stage in folder.glob(f"{_SAVING}*"):
        shutil.rmtree(stage, ignore_errors=True)


def _moves(folder: Path, names: Iterable[Any], saved: Path) -> list[tuple[Path, Path]]:
    """From where to where the saved files go, in order; ValueError where one is not within both folders."""
    moves = []
    for name in names:
        path, place = confined(saved, name, saved / _FILES), confined(folder, name, saved / _FILES)
        if place.is_dir():
            raise ValueError(f"{place} is a folder, where a file is to be saved; move it out of the way")
        moves.append((name == MANIFEST, name not in _FIRST, path, place))
    return [(path, place) for _, _, path, place in sorted(moves)]


def write_manifest(folder: Path, **entries: Any) -> None:
    """Write `mlpool.json`: every file with its size, the weights also with their SHA-256, and `entries`."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size}
            if path.suffix == ".safetensors":
                files[name]["sha256"] = sha256(path)
    write_json(folder / MANIFEST, {**entries, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, {} where there is none; ValueError if it is damaged or names a file elsewhere."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path, dict, "delete it, or copy the folder again from where it was saved")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    manifest["files"] = check(dict[str, dict[str, int | str | None]], manifest.get("files", {}), f"{path}.files")
    for name in manifest["files"]:
        confined(folder, name, path)
    return manifest


def check_folder(folder: str | Path, whole: bool = False) -> None:
    """Complete what a killed save left, and compare a folder with its manifest. Text may have been edited, weights not.

    Args:
        whole: also hash files above 256 MiB.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or a name leads out of the folder. Both
        name it.
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
            parse_json(path.read_bytes(), str(path), advice)
        elif "sha256" in entry:
            size = path.stat().st_size
            if size != entry.get("bytes"):
                raise ValueError(f"{path} has {size} bytes, {entry.get('bytes')} were saved; {advice}")
            if (whole or size <= _READ_WHOLE) and sha256(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was saved; {advice}")


def check_index(folder: Path) -> None:
    """Raises ValueError where an index of weights in several files names one outside of the folder."""
    for index in folder.glob("*.safetensors.index.json"):
        named = check(dict[str, Any], read_json(index).get("weight_map", {}), f"{index}.weight_map")
        for name in set(map(str, named.values())):
            confined(folder, name, index)
