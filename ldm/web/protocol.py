"""uvicorn with an end: of a client that does not say what it wants or does not take what it gets, and of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def impatient(seconds: float) -> type[asyncio.Protocol]:
    """The protocol for `uvicorn.Config(http=)`: cut after so many seconds of waiting for a client."""

    class Impatient(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.waited()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
                self.waited()

        def on_response_complete(self) -> None:
            self.wait()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.wait()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.waited()

        def wait(self) -> None:
            self.waited()
            self.timer = self.loop.call_later(seconds, self.transport.abort)

        def waited(self) -> None:
            if self.timer is not None:
                self.timer.cancel()

    return Impatient


class Server(uvicorn.Server):
    """Calls `ending` at Ctrl-C or SIGTERM, before it waits for the requests that are being answered."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self.ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ending()
        super().handle_exit(sig, frame)
