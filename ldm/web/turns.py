"""The queue: jobs take their turns in the order they came, one at a time, in one thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ldm.web.drawing import Event, Place, Stop, Stopped, Walked
from ldm.web.limits import Limits

Tell = Callable[[Event], Any]
Work = Callable[[Stop, Tell], None]


class Full(Exception):
    """As many jobs wait as may; the sentence that says so."""


class Ended(Exception):
    """The server ends."""


@dataclass(eq=False)
class _Waiting:
    stop: Stop
    client: str
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # set when the line has moved


class Turns:
    """One worker for all jobs. Whoever stops waiting for `run` leaves the queue, or stops the drawing."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._line: list[_Waiting] = []  # the first is drawn
        self._ended = False
        self._worker = ThreadPoolExecutor(1, "worker")

    async def run(self, draw: Work, stop: Stop, tell: Tell, client: str = "") -> None:
        """`draw` in the worker's thread when the turn has come, and `tell` of everything on the way.

        `client`: the address that asks. Raises Full, Ended, and what `draw` raises; at a cancellation it ends before
        its next evaluation.
        """
        if len(self._line) > self._limits.most_waiting:
            raise Full(f"{self._limits.most_waiting} requests wait already; try again later")
        if sum(other.client == client for other in self._line) > self._limits.client_waiting:
            raise Full(f"{self._limits.client_waiting} requests of your address wait already; wait for one of them")
        own, loop = _Waiting(stop, client), asyncio.get_running_loop()
        self._line.append(own)
        try:
            while ahead := self._line.index(own):
                tell(Place(ahead))
                await own.moved.wait()
                own.moved.clear()
                stop.check()
            await loop.run_in_executor(self._worker, draw, stop, partial(loop.call_soon_threadsafe, tell))
        except Stopped:
            if self._ended:
                raise Ended from None
            raise asyncio.CancelledError from None
        finally:
            stop.asked.set()
            self._line.remove(own)
            for other in self._line:
                other.moved.set()

    def end(self) -> None:
        """Stop all jobs, those that wait too."""
        self._ended = True
        for each in self._line:
            each.stop.asked.set()
            each.moved.set()


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
