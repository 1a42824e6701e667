"""scripts/web.py: who is kept out, and what is told before anything is opened."""

from __future__ import annotations

import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.errors import UserError
from ldm.web.guard import Gate

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "web.py")
SECRET = Gate(token="correct horse battery")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(SCRIPT)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "8.8.8.8"])
def test_other_addresses_need_a_secret(script: dict[str, Any], host: str):
    with pytest.raises(UserError, match="--token"):
        script["check_address"](host, Gate())
    script["check_address"](host, SECRET)
    script["check_address"](host, Gate(user="ann", password="another secret"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_ones_own_addresses_need_none(script: dict[str, Any], host: str):
    script["check_address"](host, Gate())


def test_a_port_that_is_taken_is_told_before_a_model_is_opened(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(sys, "argv", ["web.py", "--port", str(taken.getsockname()[1])])
        main = runpy.run_path(SCRIPT)["main"]
        monkeypatch.setattr("ldm.web.shelf.Shelf.open_models", lambda _: pytest.fail("a model was opened"))
        with pytest.raises(UserError, match="is in use; choose another by --port"):
            main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "example.org"], "give an address in numbers"),
        (["--host", "0.0.0.0"], "others than you reach"),
        (["--token", "short"], "choose one of 12"),
        (["--user", "ann"], "give both"),
        (["--model", "nowhere"], "there is no model"),
        (["--lora", "nowhere"], "there is no LoRA"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--most-steps", "0"], "most_steps must be at least 1"),
    ],
)
def test_what_is_wrong_is_told(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["web.py", *words])
    with pytest.raises(UserError, match=said):
        runpy.run_path(SCRIPT)["main"]()
