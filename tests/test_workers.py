"""The processes of a pool end with the work, and with the process that has begun them."""

from __future__ import annotations

from ldm.script import INTERRUPTED, TERMINATED

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.workers import pool

WORKING = """
from ldm.script import run
import os, sys, time
from ldm.workers import pool

def work(seconds):
    os.write(1, b"working\\n")  # one write, which another process's does not divide
    time.sleep(seconds)

def main():
    with pool(2) as processes:
        list(processes.map(work, [100, 100, 100]))

run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_they_end_at_once_however_their_parent_ends(tmp_path: Path, number: int) -> None:
    (tmp_path / "main.py").write_text(WORKING)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout and [process.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    before = time.monotonic()
    out, err = process.communicate(timeout=60)  # until the workers too have closed their ends
    assert time.monotonic() - before < 50 and out == ""
    ends = {signal.SIGINT: (130, INTERRUPTED), signal.SIGTERM: (143, TERMINATED), signal.SIGKILL: (-9, "")}
    assert (process.returncode, err) == ends[number]


def test_one_that_dies_is_a_sentence() -> None:
    with pytest.raises(UserError, match="a worker process died, perhaps because memory ran out"), pool(1) as processes:
        processes.submit(os._exit, 1).result()


def test_what_it_raises_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError), pool(1) as processes:
        processes.submit(divmod, 1, 0).result()
