"""What hostile tests share: how many inputs, what an error may be, and a limit on the time one may take.

MLPOOL_HOSTILE=50 tries fifty times as many (`make hostile`); MLPOOL_SEED picks others.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, seed, settings

ROOT = Path(__file__).resolve().parents[2]
TIMES = int(os.environ.get("MLPOOL_HOSTILE", "1"))
SEED = int(os.environ.get("MLPOOL_SEED", "0"))
_SECONDS = 60  # of one input; a hang, not a slow machine


def hostile(examples: int) -> Callable[[Any], Any]:
    """Decorates a hypothesis test: `examples` inputs times MLPOOL_HOSTILE, the same in every run of a seed."""
    options = settings(
        max_examples=examples * TIMES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: seed(SEED)(options(test))


@contextmanager
def ours(*kinds: type[Exception]) -> Iterator[None]:
    """Whatever goes wrong inside is an error that mlpool itself raised, of these kinds, with a message."""
    caught: Exception | None = None
    with _in_time():
        try:
            yield
        except kinds or (ValueError, OSError) as error:
            caught = error
    if caught is not None:
        place = Path(traceback.extract_tb(caught.__traceback__)[-1].filename)
        assert place.is_relative_to(ROOT / "mlpool"), f"{place}: {type(caught).__name__}: {caught}"
        assert str(caught).strip(), "no message"


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"no end after {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
