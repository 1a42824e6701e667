"""What asks a run to stop: signals, which are heeded between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

NOTED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The signals that came while the block runs, none of which ends it. One that nohup lets be ignored stays so."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in NOTED}
    for number, handler in before.items():
        if number == signal.SIGINT or handler != signal.SIG_IGN:
            signal.signal(number, lambda n, _: came.append(n))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
