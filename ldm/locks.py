"""A folder that one process at a time writes into: a lock that ends with its process, however that ends.

The system keeps the lock, so after a kill nothing is left to be tidied, and it holds between the machines of a network
file system. It is of POSIX's kind, in which forked children have no part: readers of data outlive a killed training by
some seconds, and it may go on at once.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm.errors import UserError, explain_os_error

NAME = ".lock"  # in the folder: "PROCESS HOST TIME" of whoever writes there; removed at an end in order
WRITING = 1.0  # seconds within which who has the lock has written so, or let it go after a look
MISSING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without locks

logger = logging.getLogger(__name__)


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Let no other process write into `folder`, which is made for what the block writes, while that runs.

    Raises UserError if one does, and says which; or if the folder cannot be made or written.
    """
    path = Path(folder) / NAME
    new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
        while not _is_at(path, file):  # its last owner removed it meanwhile
            file.close()
            file = _locked(path)
        _look_back(path, file)
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%dT%H:%M:%S')}\n")
        file.flush()
    except OSError as error:
        raise explain_os_error(error, f"writing {path}") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # it has something in it
                    path.parent.rmdir()


def check_free(folder: str | Path) -> None:
    """Raise UserError if another process holds `folder`. Nothing is made, and others may ask at the same moment."""
    path = Path(folder) / NAME
    if path.exists():
        try:
            _locked(path, shared=True).close()
        except OSError as error:
            raise explain_os_error(error, f"writing {path}") from error


def _locked(path: Path, shared: bool = False) -> IO[str]:
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - the caller closes it
    until = time.monotonic() + WRITING
    while True:
        try:
            import fcntl

            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError):
            process, host, since = _owner(file)
            if since != "?" or time.monotonic() >= until:
                file.close()
                raise UserError(
                    f"process {process} on {host} has been writing into {path.parent} since {since}; let it end, or "
                    "choose another folder"
                ) from None
            time.sleep(0.02)
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in MISSING:
                file.close()
                raise
            logger.warning("%s cannot be locked here; see to it that no other process writes into it", path.parent)
            return file


def _owner(file: IO[str]) -> tuple[str, str, str]:
    """Process, host and time."""
    file.seek(0)
    process, host, since = (*file.read(200).split(), "?", "?", "?")[:3]
    return process, host, since


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _look_back(path: Path, file: IO[str]) -> None:
    """Some network file systems keep a machine's locks to itself; another's run is then seen by what it wrote alone."""
    process, host, since = _owner(file)
    if host not in ("?", socket.gethostname()):
        told = (
            "process %s on %s began to write into %s at %s and has not told its end; if it still runs, stop one of you"
        )
        logger.warning(told, process, host, path.parent, since)
