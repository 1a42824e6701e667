"""uvicorn with an end: of a client that does not say what it wants or does not take what it gets, and of itself."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ldm.web.guard import HEADERS, MORE
from ldm.web.limits import Limits

CROWDED = 1.0  # seconds that one connection too many may take to say something, and be told so


def impatient(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol for `uvicorn.Config(http=)`: it waits for no client longer than `limits` say, and refuses what is
    no HTTP and connections that are too many, of all or of one address, in a sentence."""
    of_address: Counter[str] = Counter()

    class Impatient(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        address = ""
        crowded = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.address = self.client[0] if self.client else ""
            of_address[self.address] += 1
            own, everyones = of_address[self.address], len(self.connections)
            self.crowded = own > limits.client_connections or everyones > limits.connections
            self.wait(CROWDED if self.crowded else limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self.waited()
            of_address[self.address] -= 1
            if not of_address[self.address]:
                del of_address[self.address]
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.crowded:
                return self.refuse(503, "too many connections are open; close some, or try again later")
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
                self.waited()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                return self.transport.abort()
            self.refuse(400, "this is no request in HTTP; open the page in a browser, or see /api/schema")

        def refuse(self, status: int, sentence: str) -> None:
            body = json.dumps({"error": sentence})
            own = {"Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
            lines = HEADERS | MORE.get(status, {}) | own
            head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {lines[name]}" for name in lines)]
            self.transport.write("\r\n".join([*head, "", body]).encode())
            self.transport.close()

        def on_response_complete(self) -> None:
            self.wait(limits.header_seconds)
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.wait(limits.slow_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.waited()

        def wait(self, seconds: float) -> None:
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
