"""Models that nodes of a cluster import, too."""

import os
import time
from pathlib import Path

import numpy as np
from fake import Fake


class Broken(Fake):
    """One embedding of every block is no number."""

    def encode(self, texts, **options):
        result = super().encode(texts, **options)
        result[4, 2] = np.nan
        return result


class Dies(Fake):
    """Takes its process with it, as what runs out of memory does."""

    def encode(self, texts, **options):
        os._exit(1)


class Waits(Fake):
    """Stops before the text of a number for as long as a file is there, and no longer than two minutes."""

    def __init__(self, number: int, gate: Path) -> None:
        super().__init__()
        self._number, self._gate = number, gate

    def encode(self, texts, **options):
        end = time.monotonic() + 120
        last = int(texts[-1].split()[1]) if texts[-1].startswith("text ") else 0
        while last >= self._number and self._gate.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return super().encode(texts, **options)


class Slow(Fake):
    """Takes a time for every text, and no core: what a cluster's handing out costs shows on any machine."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def encode(self, texts, **options):
        time.sleep(self._seconds * len(texts))
        return np.ones((len(texts), 8), np.float32) / 8**0.5
