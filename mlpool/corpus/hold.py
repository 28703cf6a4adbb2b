"""A folder is for one run at a time: its first process holds it, and another run is told who does."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..remote import RemotePath

HOLDER = "holder.json"
_PATIENCE = 1.0  # seconds before a folder counts as held
# Where nothing can be locked a holder writes its name again and again: who has not for so many seconds is dead.
_BEAT, _DEAD = 15.0, 90.0


@contextmanager
def held(folder: Path, notes: Path, rank: int = 0) -> Iterator[str | None]:
    """Hold `folder`, in whose subfolder `notes` it is written down, until the block ends. The system lets go of what a
    killed process held; on a `RemotePath`, which has no locks, that takes 90 seconds.

    Args:
        rank: the processes of one job beside its first only look who holds it.

    Returns: what tells this hold from others, for `holds`; None for a rank that only looked.

    Raises:
        BlockingIOError: another run writes to it; the message says which process, where, and since when.
    """
    from filelock import FileLock

    if rank and _holder(notes).get("job") == _job():
        yield None
        return
    # Not at once: other ranks look at it, too, each for a moment.
    lock = None if isinstance(notes, RemotePath) else FileLock(notes / ".lock", timeout=_PATIENCE)
    if not _acquired(lock, notes):
        if not (rank and _holder(notes).get("job") == _job()):
            raise _refusal(folder, notes)
        yield None
        return
    try:
        if rank:
            yield None
            return
        token = secrets.token_hex(8)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        me = {"job": _job(), "host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}
        write_json(notes / HOLDER, me)
        try:
            if lock:
                yield token
            else:
                with _beating(folder, notes, me):
                    yield token
        finally:
            if holds(notes, token):
                (notes / HOLDER).unlink(missing_ok=True)
    finally:
        if lock:
            lock.release()


def holds(notes: Path, token: str) -> bool:
    """Whether the hold that `held` returned lasts."""
    return _holder(notes).get("token") == token


def _acquired(lock: Any, notes: Path) -> bool:
    from filelock import Timeout

    if not lock:
        return not _holder(notes) or _silent(notes) > _DEAD
    while True:
        try:
            lock.acquire()
            return True
        except Timeout:
            return False
        except FileNotFoundError:  # a run that ended just now took its notes with it
            notes.mkdir(parents=True, exist_ok=True)


def _silent(notes: Path) -> float:
    """Seconds since the holder wrote its name, by the clock of the filesystem; 0 where it has none."""
    now = notes / ".clock"
    now.write_bytes(b"")
    with suppress(FileNotFoundError):
        return (now.stat().st_mtime_ns - (notes / HOLDER).stat().st_mtime_ns) / 1e9
    return _DEAD + 1  # it has ended meanwhile


@contextmanager
def _beating(folder: Path, notes: Path, me: dict[str, Any]) -> Iterator[None]:
    time.sleep(_PATIENCE)
    if not holds(notes, me["token"]):  # two began at once: the later one is written down
        raise _refusal(folder, notes)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):  # the next may succeed
                if holds(notes, me["token"]):
                    write_json(notes / HOLDER, me)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _refusal(folder: Path, notes: Path) -> BlockingIOError:
    who = _holder(notes)
    by = f"process {who.get('pid')} on {who.get('host')} since {who.get('since')}" if who else "another run"
    late = f"; a killed one holds it for {_DEAD:.0f} seconds more" if isinstance(notes, RemotePath) else ""
    return BlockingIOError(f"{folder} is being written by {by}; wait for it, stop it, or name another folder{late}")


def _holder(notes: Path) -> dict[str, Any]:
    """Who wrote down that it holds the folder; of use only while the hold lasts."""
    with suppress(FileNotFoundError, ValueError):
        return read_json(notes / HOLDER)
    return {}


def _job() -> str:
    """What the processes of one torchrun share, and those of another do not."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    return " ".join(os.environ.get(name, "") for name in names)
