"""Models that nodes of a cluster import, too."""

import os
import time

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


class Slow(Fake):
    """Takes a time for every text, and no core: what a cluster's handing out costs shows on any machine."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def encode(self, texts, **options):
        time.sleep(self._seconds * len(texts))
        return np.ones((len(texts), 8), np.float32) / 8**0.5
