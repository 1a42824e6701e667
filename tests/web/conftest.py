"""A real server on a free port, in this process, over the small model that draws in milliseconds."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]

    @property
    def events(self) -> list[tuple[str, Any]]:
        return [parse_event(block) for block in self.body.decode().split("\n\n") if block]


def parse_event(block: str) -> tuple[str, Any]:
    name, data = block.split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@dataclass(frozen=True)
class Server:
    port: int
    shelf: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """From an address `source` of this machine."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout, source_address=(source, 0))

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = "") -> Answer:
        """POST where there is a body (JSON, unless it is bytes), else GET."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers or {}))
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def draw(self, accept: str = "image/png", **job: Any) -> Answer:
        return self.ask("/api/draw", {"steps": 2} | job, {"Accept": accept})


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@contextmanager
def serving(shelf: Any, **given: Any) -> Iterator[Server]:
    """`given`: of `make_app`."""
    from ldm.web.app import make_app
    from ldm.web.limits import Limits
    from ldm.web.protocol import impatient

    limits = given.setdefault("limits", Limits())
    config = uvicorn.Config(
        make_app(shelf, **given),
        port=0,
        http=impatient(limits),
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=1,
        log_level="error",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Server(server.servers[0].sockets[0].getsockname()[1], shelf)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shelf(tiny_checkpoint: Path) -> Any:
    from ldm.web.shelf import Shelf, named

    made = Shelf(named([str(tiny_checkpoint)], "model"), device="cpu")
    made.open_models()
    return made


@pytest.fixture(scope="session")
def server(shelf: Any) -> Iterator[Server]:
    with serving(shelf) as running:
        yield running
