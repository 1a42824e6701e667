"""The next batch, waited for in a way that a signal or the end of the time can cut short."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any

ENDING = 8.0  # seconds for the thread to find its readers dead; torch looks every 5


class Fetcher:
    """Reads `batches` in a thread, and only what was asked for: the thread runs while the loop waits, never beside it.

    A thread, because nothing else can leave a read that hangs; one for all batches, because torch makes a pool of
    processor threads for each that computes.
    """

    def __init__(self, batches: Any) -> None:
        self._iterator = iter(batches)
        self._asked: SimpleQueue[bool] = SimpleQueue()  # False: end
        self._there = threading.Event()
        self._there.set()
        self._batch: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="fetching", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Begin to fetch the next batch."""
        self._there.clear()
        self._asked.put(True)

    def wait(self, seconds: float) -> bool:
        """Whether `take` has something to give, after `seconds` at most."""
        return self._there.wait(seconds)

    def failed(self) -> bool:
        """Once `wait` has said True: whether `take` will raise."""
        return self._error is not None

    def take(self) -> Any:
        """The batch that was asked for; raises what reading it raised."""
        if self._error is not None:
            raise self._error
        batch, self._batch = self._batch, None
        return batch

    def close(self) -> None:
        """End the data readers too: they heed no signal, and the process would wait for them."""
        self._asked.put(False)
        if self._there.is_set():
            self._thread.join()
            if isinstance(self._iterator, Generator):
                self._iterator.close()
        elif readers := [child for child in multiprocessing.active_children() if child.daemon]:
            for reader in readers:  # which are in the middle of what the thread waits for
                reader.kill()
            self._thread.join(ENDING)

    def _serve(self) -> None:
        while self._asked.get():
            try:
                self._batch = next(self._iterator)
            except BaseException as error:
                self._error = error
            self._there.set()
