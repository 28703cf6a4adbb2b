"""What hostile tests share: inputs drawn from a seed, what an error may be, and a limit on the time one may take.

MLPOOL_HOSTILE=50 tries fifty times as many (`make hostile`); MLPOOL_SEED picks others. An input depends on nothing but
its test, its number and that seed: what fails in one process, beside whatever other tests, fails in every other.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMES = int(os.environ.get("MLPOOL_HOSTILE", "1"))
SEED = int(os.environ.get("MLPOOL_SEED", "0"))
_SECONDS = 60  # of one input; a hang, not a slow machine


def cases(count: int, name: object) -> Iterator[random.Random]:
    """A generator of random numbers for each of `count` inputs, times MLPOOL_HOSTILE, of the test called `name`."""
    for case in range(count * TIMES):
        yield random.Random(f"{SEED} {name} {case}")


# --- what may become of an input --------------------------------------------------------------------------------------

OURS: tuple[type[Exception], ...] = (ValueError, OSError)  # what `mlpool` prints as one line


def tried(
    call: Callable[[], Any], shown: object, kinds: tuple[type[Exception], ...] = OURS, foreign: bool = True
) -> Any:
    """The call's result, or None for an error of these kinds, which has a message.

    Args:
        shown: the input, for the message of a failure.
        foreign: whether it may come from a library; otherwise mlpool itself must have raised it.
    """
    try:
        with _in_time():
            return call()
    except kinds as error:
        place, said = Path(traceback.extract_tb(error.__traceback__)[-1].filename), str(error)
        if said.strip() and (foreign or place.is_relative_to(ROOT / "mlpool")):
            return None
        raise AssertionError(f"{place}: {type(error).__name__}: {said!a:.2000}\non {shown!a:.2000}") from error
    except (Exception, _TooLong) as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)!a:.2000}\non {shown!a:.2000}") from error


class _TooLong(BaseException):
    """No Exception: no handler of the code under test catches it."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"no end after {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- inputs -----------------------------------------------------------------------------------------------------------

WORDS = [
    "@x", "{", "[1", '"', "%", "*a", "&a", "!!int x", "!!python/name:os", "null", "~", "true", "no", ".inf", "-.inf",
    ".nan", "1e-5", "1e999", "-1", "0", "0x1F", "1:30", "007", "9" * 5000, "2024-13-01", "", " ", "\0", "\u2028",
    "\ud800", "é" * 300, "../..", "a.b", "[" * 2000, "{a: " * 500, "<<", "? ", "- ", "| ", "x: y: z", "'",
]  # fmt: skip
# Texts that are JSON, or nearly, and what a field may hold.
VALUES = [
    "null", "true", "NaN", "-Infinity", "1e400", "1" + "0" * 400, "9" * 5000, '""', '"\\ud83d"', '"\\u2028"', "[]",
    "{}", "[[[]]]", "[" * 3000, '{"a":' * 3000, '"' + "x" * 70_000 + '"', '"\\u0000"', "0", "-1", "0.5", '"0"',
]  # fmt: skip
BYTES = [
    b"", b"\xff\xfe", b"\x00" * 20, b"\xef\xbb\xbf", b"\r", b"\n\n", "\u2028".encode(), b'{"', b"]", b"\t", b",", b'"',
]  # fmt: skip
_NUMBERS = [0.0, -0.0, 1.0, 5e-324, 1.8e308, 1e-7, float("inf"), float("-inf"), float("nan")]
_LETTERS = [(0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0xD800, 0xE000), (0x2000, 0x2070), (0, 0x110000)]


def text(rng: random.Random, most: int) -> str:
    """Up to `most` characters, half of them ASCII, the others of any kind."""
    ranges = rng.choices(_LETTERS, [5, 1, 1, 1, 1, 1], k=rng.randint(0, most))
    return "".join(chr(rng.randrange(*between)) for between in ranges)


def scalar(rng: random.Random) -> Any:
    return rng.choice([
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.randint(-3, 9), lambda: rng.randint(-(2**70), 2**70),
        lambda: rng.choice(_NUMBERS), lambda: struct.unpack("d", rng.randbytes(8))[0], lambda: rng.choice(WORDS),
        lambda: text(rng, 8),
    ])()  # fmt: skip


def value(rng: random.Random, keys: Callable[[], Any], depth: int = 2) -> Any:
    """A scalar, or a list or a dict (with `keys()`) of up to three values."""
    kind = rng.random() if depth else 0.0
    if kind < 0.6:
        return scalar(rng)
    inner = [value(rng, keys, depth - 1) for _ in range(rng.randint(0, 3))]
    return inner if kind < 0.8 else {keys(): one for one in inner}


def mangled(content: bytes, rng: random.Random) -> bytes:
    """One to three faults: cut, flipped, doubled, replaced, or with something foreign put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + content[max(0, at - rng.randint(1, 30)) :]
        elif kind == 3:
            content = content[:at] + rng.choice(BYTES) + content[at:]
        elif kind == 4:
            content = content[:at] + rng.randbytes(rng.randint(0, 6)) + content[at + rng.randint(0, 20) :]
        else:
            lines = content.split(b"\n")
            line = rng.randrange(len(lines))
            new = rng.choice(VALUES).encode()
            key, colon, _ = lines[line].partition(b":")
            lines[line] = key + colon + new + b"}" if colon else new
            content = b"\n".join(lines)
    return content
