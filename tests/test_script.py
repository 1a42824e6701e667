"""A script ends in one sentence: of a mistake, and of Ctrl-C, whenever that comes."""

from __future__ import annotations

from ldm.script import INTERRUPTED, TERMINATED, Terminated, run

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ldm.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no shard at x; check the path"), 1, "error: no shard at x; check the path\n"),
        (KeyboardInterrupt(), 130, INTERRUPTED),
        (Terminated(), 143, TERMINATED),
    ],
)
def test_a_script_ends_in_one_sentence(capsys, error, code, said):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run(main)
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", said)


def test_what_is_no_user_error_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_what_becomes_of_ctrl_c_in_clearing_up_is_still_ctrl_c(capsys):
    """As in argparse, whose clearing up after intermixed arguments fails if these were not begun."""

    def main() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            _ = main.not_there  # type: ignore[attr-defined]

    with pytest.raises(SystemExit) as exit_:
        run(main)
    assert exit_.value.code == 130 and capsys.readouterr().err == INTERRUPTED


def heed_interrupts() -> None:
    """Where the tests were started in the background, a shell has told them, and so their children, to ignore these."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin(*words: str | Path, folder: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        preexec_fn=heed_interrupts,
    )


IMPORTS = """
from ldm.script import run
def main():
    import optional
    print("went on without it")
run(main)
"""
SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{})
    for _ in range(1000): pass
except BaseException:
    pass
"""
IN_THE_MIDDLE = """
from ldm.script import run
import os, signal, sys, time
from ldm.files import atomic_write
def main():
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(60)
run(main)
"""
AT_THE_END = """
from ldm.script import run
import atexit, os, signal, time
atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
def main():
    print("done")
run(main)
"""
TWICE = """
from ldm.script import run
import os, signal, time
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
run(main)
"""


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, INTERRUPTED), ("SIGTERM", 143, TERMINATED)])
def test_what_is_half_written_is_cleared_away(tmp_path, name, code, said):
    (tmp_path / "main.py").write_text(IN_THE_MIDDLE)
    out, err = (process := begin(tmp_path / "main.py", tmp_path / "file", name)).communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", said)
    assert [path.name for path in tmp_path.iterdir()] == ["main.py"]


def test_who_asks_twice_need_not_wait_for_the_clearing_up(tmp_path):
    (tmp_path / "main.py").write_text(TWICE)
    out, err = (process := begin(tmp_path / "main.py")).communicate(timeout=50)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_signal_that_comes_when_all_is_done_is_no_traceback(tmp_path):
    (tmp_path / "main.py").write_text(AT_THE_END)
    out, err = (process := begin(tmp_path / "main.py")).communicate(timeout=50)
    assert (process.returncode, out, err) == (143, "done\n", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_that_takes_an_interrupt_for_the_absence_of_a_package(tmp_path, name):
    (tmp_path / "optional.py").write_text(SWALLOWS.format(name))
    (tmp_path / "main.py").write_text(IMPORTS)
    out, err = (process := begin(tmp_path / "main.py")).communicate(timeout=60)
    expected = {"SIGINT": (130, "", INTERRUPTED), "SIGTERM": (143, "", TERMINATED)}
    assert (process.returncode, out, err) == expected[name]


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    """As by jobs that a script of a shell starts in the background."""
    (tmp_path / "optional.py").write_text(SWALLOWS.format("SIGINT"))
    (tmp_path / "main.py").write_text(f"import signal; signal.signal(2, signal.SIG_IGN)\n{IMPORTS}")
    out, err = (process := begin(tmp_path / "main.py")).communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "went on without it\n", "")


SHARD = str(ROOT / "tests/fixtures/icons/val-0000.tar")
FIRST_SECONDS = [
    ("train_autoencoder.py", "--config", "tiny", f"data.shards={SHARD}", "loss.perceptual=0", "output=run"),
    ("txt2img.py", "--prompt", "a cat", "--steps", "9999", "--spacing", "karras"),
    ("evaluate.py", "likelihood", "--shards", SHARD),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", FIRST_SECONDS, ids=lambda words: words[0])
def test_ctrl_c_in_the_first_seconds(tmp_path, words: Sequence[str]):
    """While torch is imported, for the most part. (What comes before a script's first line is Python's own.)"""
    rng = random.Random(0)
    for _ in range(6):
        before = time.monotonic()
        subprocess.run([sys.executable, "-c", "import ldm.script"], check=True)
        start = 2 * (time.monotonic() - before)
        process = begin(ROOT / "scripts" / words[0], *words[1:], folder=tmp_path)
        time.sleep(rng.uniform(start, max(2, 10 * start)))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (130, INTERRUPTED)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


LAUNCHED = """
from ldm.script import run
import os, sys, time
def main():
    print(os.getpid(), flush=True)
    time.sleep(60)
run(main)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, sys.argv[1]]).wait()"


@pytest.mark.parametrize(
    ("launcher", "variable", "how", "ends"),
    [
        ("accelerate-launch", "ACCELERATE_MIXED_PRECISION", signal.SIGTERM, True),
        ("torchrun", "TORCHELASTIC_RUN_ID", signal.SIGKILL, True),
        ("nightly", "ACCELERATE_MIXED_PRECISION", signal.SIGTERM, False),
        ("accelerate-all.sh", "", signal.SIGKILL, False),
    ],
)
def test_who_was_launched_ends_with_the_launcher(tmp_path, monkeypatch, launcher, variable, how, ends):
    """And nobody else: a shell, or a script of one's own with a launcher's settings, may end before its children."""
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "no")
    (tmp_path / launcher).write_text(LAUNCHER)
    (tmp_path / "main.py").write_text(LAUNCHED)
    process = begin(tmp_path / launcher, tmp_path / "main.py")
    assert process.stdout and process.stderr
    child = int(process.stdout.readline())
    process.send_signal(how)
    process.wait(timeout=60)
    if ends:
        assert process.stdout.read() == ""  # which waits until the child too has closed it
        said = f"warning: process {process.pid}, which began this one, is gone, so it ends too\n"
        assert process.stderr.read() == said + TERMINATED
    else:
        time.sleep(1)
        os.kill(child, signal.SIGKILL)  # it is still there
