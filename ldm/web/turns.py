"""The queue: jobs take their turns in the order they came, one at a time, in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ldm.web.drawing import Event, Place, Stop, Stopped, Walked

Tell = Callable[[Event], Any]
Work = Callable[[Stop, Tell], None]


class Full(Exception):
    """As many jobs wait as may."""


class Ended(Exception):
    """The server ends."""


class Turns:
    """One worker for all jobs. Whoever stops waiting for `run` leaves the queue, or stops the drawing."""

    def __init__(self, most_waiting: int) -> None:
        self._most = most_waiting
        self._line: list[asyncio.Event] = []  # one for each job, set when the line has moved; the first is drawn
        self._stops: list[Stop] = []
        self._ended = False
        self._worker = ThreadPoolExecutor(1, "worker")

    async def run(self, draw: Work, stop: Stop, tell: Tell) -> None:
        """`draw` in the worker's thread when the turn has come, and `tell` of everything on the way.

        Raises Full, Ended, and what `draw` raises; at a cancellation it ends before its next evaluation.
        """
        if len(self._line) > self._most:
            raise Full
        moved, loop = asyncio.Event(), asyncio.get_running_loop()
        self._line.append(moved)
        self._stops.append(stop)
        try:
            while ahead := self._line.index(moved):
                tell(Place(ahead))
                await moved.wait()
                moved.clear()
                stop.check()
            await loop.run_in_executor(self._worker, draw, stop, partial(loop.call_soon_threadsafe, tell))
        except Stopped:
            if self._ended:
                raise Ended from None
            raise asyncio.CancelledError from None
        finally:
            stop.asked.set()
            self._line.remove(moved)
            self._stops.remove(stop)
            for other in self._line:
                other.set()

    def end(self) -> None:
        """Stop all jobs, those that wait too."""
        self._ended = True
        for stop, moved in zip(self._stops, self._line, strict=True):
            stop.asked.set()
            moved.set()


class Mailbox:
    """Events for a client that may be slow: a step that was not taken yet gives way to the next."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        if self._events and isinstance(event, Walked | Place) and isinstance(self._events[-1], Walked | Place):
            self._events.pop()
        self._events.append(event)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._events or not self._closed:
            if self._events:
                yield self._events.pop(0)
            else:
                self._ready.clear()
                await self._ready.wait()
