"""One process at a time writes into a folder, and however it ends, the next one may."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.locks import check_free, held

# Holds the folder; a forked child, as a reader of data is one, outlives it.
HOLDER = """
import os, sys, time
from ldm.locks import held
with held(sys.argv[1]):
    if not os.fork():
        time.sleep(60)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == f"{process.pid}\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)  # its child too
    process.wait()


def test_another_process_is_named(holder: subprocess.Popen, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = rf"process {holder.pid} on {socket.gethostname()} has been writing into {folder} since 20\S+; let it end"
    for _ in range(2):  # nobody takes anything from who holds it
        with pytest.raises(UserError, match=said):
            check_free(folder)
        with pytest.raises(UserError, match=said), held(folder):
            pass
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait(timeout=60)
    with held(folder):
        assert (folder / ".lock").read_text().startswith(f"{os.getpid()} {socket.gethostname()} ")
    assert not list(tmp_path.iterdir())


def test_a_lock_dies_with_its_process_though_its_children_live(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait(timeout=60)
    assert (tmp_path / "run" / ".lock").exists()
    check_free(tmp_path / "run")
    with held(tmp_path / "run"):
        pass


# Has the lock, and writes who it is a while later, or lets it go.
SLOW = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(0.3)
if sys.argv[2] == "writes":
    print(os.getpid(), "far", "2026-01-01", file=file, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("then", ["writes", "lets go"])
def test_who_has_the_lock_and_has_not_yet_written_its_name(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.locks.WRITING", 60.0)  # on a busy machine a moment is long
    words = [sys.executable, "-c", SLOW, str(tmp_path / ".lock"), then]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "locked\n"
        if then == "writes":
            with pytest.raises(UserError, match=f"process {other.pid} on far has been writing"):
                check_free(tmp_path)
        else:
            with held(tmp_path):
                assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} ")
        other.kill()


ASKING = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_SH)
print("asking", flush=True)
time.sleep(60)
"""


def test_the_processes_of_one_run_may_ask_at_the_same_moment(tmp_path: Path) -> None:
    """Where one that was killed has left the file."""
    words = [sys.executable, "-c", ASKING, str(tmp_path / ".lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "asking\n"
        check_free(tmp_path)
        other.kill()


def test_a_free_folder_is_left_alone(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    check_free(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("new", [False, True])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, new: bool) -> None:
    folder = tmp_path / "run" if new else tmp_path
    with pytest.raises(ZeroDivisionError), held(folder):
        raise ZeroDivisionError
    assert tmp_path.exists() and not list(tmp_path.iterdir())
    with held(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_who_has_the_lock_of_a_name_that_is_gone_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last owner removed the file between the opening and the locking of it."""
    lockf, removed = fcntl.lockf, []

    def late(*arguments: object) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        lockf(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "lockf", late)
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, number) -> None:
    def missing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", missing)
    with held(tmp_path):
        assert f"{tmp_path} cannot be locked here; see to it that no other process writes into it" in caplog.text


def test_another_machine_whose_lock_may_not_be_seen_here_is_told(tmp_path: Path, caplog) -> None:
    (tmp_path / ".lock").write_text("12 node7 2026-01-01T00:00:00\n")
    with held(tmp_path):
        assert "process 12 on node7 began to write into" in caplog.text and "if it still runs, stop one" in caplog.text
    caplog.clear()
    for text in (f"12 {socket.gethostname()} 2026", "\xff\0", "x"):  # killed here, where a lock would be seen; damaged
        (tmp_path / ".lock").write_text(text)
        with held(tmp_path):
            assert not caplog.text


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = r"a file where a folder is needed .* while writing .*file/run/\.lock"
    with pytest.raises(UserError, match=said), held(tmp_path / "file" / "run"):
        pass
