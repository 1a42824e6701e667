"""The command as a process of its own under load: each client gets its picture, nothing that is sent makes it grow.

`pytest -n 0 -m slow -s tests/web/test_load.py` prints the figures.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from web.conftest import Server, pixels
from web.test_sent import parts, png, spot

ROOT = Path(__file__).parents[2]
REQUESTS = 1000
GROWTH = 40  # MB of a process with torch in it, whose allocator keeps what it had at most; a leak of one body is 20


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def process(tiny_checkpoint: Path) -> Iterator[tuple[psutil.Process, Server]]:
    words = ("scripts/web.py", "--model", tiny_checkpoint, "--device", "cpu", "--port", 0, "--slow-seconds", 5)
    with subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, MALLOC_ARENA_MAX="2"),
    ) as started:  # fmt: skip
        assert started.stdout is not None and started.stderr is not None
        line = started.stdout.readline()
        assert line.endswith("draws with tiny\n"), started.stderr.read()
        yield psutil.Process(started.pid), Server(int(line.split()[0].rpartition(":")[2]), None)
        started.terminate()
        told = started.stderr.read()
        assert started.wait(20) in (143, 0, -15) and "Traceback" not in told, told


@pytest.mark.slow
def test_ctrl_c_ends_what_is_drawn_and_what_waits(tiny_checkpoint: Path):
    words = ("scripts/web.py", "--model", tiny_checkpoint, "--device", "cpu", "--port", 0)
    started = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )
    assert started.stdout is not None
    server = Server(int(started.stdout.readline().split()[0].rpartition(":")[2]), None)
    long = {"sampler": "langevin", "options": {"moves": 10**6}, "steps": 2}
    with ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(server.draw, accept, **long) for accept in ("image/png", "text/event-stream", "*/*")]
        time.sleep(1)
        began = time.monotonic()
        started.send_signal(signal.SIGINT)
        answers = [each.result() for each in asked]
    _, told = started.communicate(timeout=20)
    assert started.returncode == 130 and "Traceback" not in told and "ERROR" not in told, told
    assert time.monotonic() - began < 8
    assert sorted(answer.status for answer in answers) == [200, 503, 503]
    assert all("the server ends" in answer.body.decode() for answer in answers)


@pytest.mark.slow
def test_64_clients_at_a_time_each_get_the_commands_picture(process: Any, tiny_checkpoint: Path, tmp_path: Path):
    _, server = process
    words = ("--model", tiny_checkpoint, "--device", "cpu", "--prompt", "a cat", "--steps", 3, "--seed", 100)
    run("scripts/txt2img.py", *words, "--n", 64, "--batch-size", 1, "--out", tmp_path)
    wanted = [pixels(path.read_bytes()) for path in sorted(tmp_path.glob("*.png"))]
    with ThreadPoolExecutor(64) as clients:
        gate = threading.Barrier(64)

        def ask(i: int) -> Any:
            gate.wait()
            return server.draw(prompt="a cat", steps=3, seed=100 + i)

        began = time.monotonic()
        answers = list(clients.map(ask, range(64)))
    print(f"\n64 clients: {Counter(answer.status for answer in answers)}, {time.monotonic() - began:.1f} s")
    assert [answer.status for answer in answers] == [200] * 64
    assert all(np.array_equal(pixels(answer.body), image) for answer, image in zip(answers, wanted, strict=True))
    assert len({answer.body for answer in answers}) == 64


# ---------------------------------------------------------------- clients of all kinds


def small(server: Server) -> Any:
    return server.draw(steps=1, seed=random.randrange(10**6)).status


def listened(server: Server) -> Any:
    return server.draw("text/event-stream", steps=2).events[-1][0]


def sent(server: Server) -> Any:
    return parts(server, {"steps": 1}, image=png(), mask=spot()).status


def malformed(server: Server) -> Any:
    return server.ask("/api/draw", random.choice([b"{", b"\xff", b"[]", b'{"steps":"x"}', b'{"a":1}', b""])).status


def nested(server: Server) -> Any:
    return server.ask("/api/draw", b"[" * 100_000 if random.random() < 0.5 else b'{"a":' * 100_000).status


def large(server: Server) -> Any:
    """All of 100 MB, as fast as it is taken."""
    connection = server.connect()
    try:
        connection.request("POST", "/api/draw", b" " * 10**8)
        return connection.getresponse().status
    except OSError:
        return "reset"
    finally:
        connection.close()


def large_unsaid(server: Server) -> Any:
    connection = server.connect()
    try:
        connection.request("POST", "/api/recipe", (b"x" * 10**6 for _ in range(100)), encode_chunked=True)
        return connection.getresponse().status
    except OSError:
        return "reset"
    finally:
        connection.close()


def fair(server: Server) -> Any:
    """20 MB that may be sent, and are no picture."""
    return server.ask("/api/recipe", b"x" * 20 * 10**6).status


def hung_up(server: Server) -> Any:
    connection = server.connect()
    body = json.dumps({"steps": 150}).encode()
    connection.request("POST", "/api/draw", body, {"Accept": random.choice(["text/event-stream", "image/png"])})
    time.sleep(random.random() * 0.1)
    connection.close()
    return "left"


def vanished(server: Server) -> Any:
    """In the middle of its body, by a reset."""
    connection = server.connect()
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", str(10**7))
    connection.endheaders()
    connection.send(b" " * 10**5)
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    return "left"


def slow(server: Server) -> Any:
    """A letter a second, until the server has enough."""
    connection = server.connect()
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    try:
        for _ in range(8):
            connection.send(b" ")
            time.sleep(1)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return "reset"
    finally:
        connection.close()


KINDS: dict[Callable[[Server], Any], int] = {
    small: 300, listened: 100, sent: 100, malformed: 150, nested: 120, large: 20, large_unsaid: 10, fair: 30,
    hung_up: 80, vanished: 70, slow: 20,
}  # fmt: skip


@pytest.mark.slow
def test_a_thousand_requests_of_all_kinds_leave_it_as_it_was(process: Any):
    watched, server = process
    assert sum(KINDS.values()) == REQUESTS
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    random.Random(0).shuffle(kinds)

    def resident() -> float:
        time.sleep(1)
        return watched.memory_info().rss / 1e6

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda kind: kind(server), [kind for kind in KINDS if kind is not slow] * 8))  # warmed up
        before, began = resident(), time.monotonic()
        found = list(clients.map(lambda kind: (kind.__name__, kind(server)), kinds))
    after, seconds = resident(), time.monotonic() - began
    table = Counter(found)
    print(f"\n{REQUESTS} requests in {seconds:.0f} s; {before:.0f} MB before, {after:.0f} MB after, {dict(table)}")
    assert after - before < GROWTH
    assert watched.num_threads() < 100 and len(watched.net_connections()) < 40
    for name, answers in {
        "small": {200}, "listened": {"done"}, "sent": {200}, "malformed": {400}, "nested": {400},
        "large": {413, "reset"}, "large_unsaid": {413, 503, "reset"}, "fair": {400, 503}, "slow": {408, "reset"},
    }.items():  # fmt: skip
        assert {answer for kind, answer in table if kind == name} <= answers, name
    assert server.draw(seed=1).status == 200
