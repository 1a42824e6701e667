"""A remote shard -> a local file: whole, or not at all.

A transfer that breaks off goes on at the byte where it broke where the server can (HTTP ranges, fsspec's seek), and
from the beginning where it cannot. Each attempt that brings nothing new waits twice as long as the one before, with
some randomness, so that a thousand readers of a store that stumbled do not all come back at once.

What did not say how long it would be, and ends before its tar does, is asked for once more: only if it ends there again
is it what the source holds.
"""

from __future__ import annotations

import http.client
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ldm.data.sources import PIPE, file_system
from ldm.data.tars import NotATar, read_headers
from ldm.errors import explain_os_error, kind_and_line

ATTEMPTS = 8  # in a row that bring nothing new
FIRST_PAUSE = 0.5  # seconds; the seventh is 32
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 2**20
AHEAD = 2**26  # bytes that are reserved at once, at most, for what does not say how long it is

_PASSING = (408, 425, 429)  # of the 4xx; every other one will say the same again


class Unreachable(Exception):
    """The source is not available; the message says why."""


class _Refused(Exception):
    """The answer will not change."""


@dataclass
class _Opened:
    stream: IO[bytes]
    begin: int  # offset of the stream's first byte
    total: int | None  # bytes of the whole, if the source says
    tag: str = ""  # names the version of what is read


def fetch(source: str, target: Path, reserve: Callable[[int, int], int]) -> None:
    """Copy `source` to `target`, a file that is there. Raises Unreachable, and UserError if the disk does not take it.

    `reserve(least, wish)` makes the target `wish` bytes long, or `least` if these are all there may be, and returns how
    long; it is called before anything is written, with the whole size as soon as it is known.
    """
    tag, written, furthest, failures, ended = "", 0, 0, 0, -1
    while True:
        try:
            with _open(source, written, tag) as opened:
                tag, written = opened.tag, opened.begin
                reserved = 0 if opened.total is None else reserve(opened.total, opened.total)
                for chunk in _chunks(opened):
                    end = written + len(chunk)
                    if end > reserved:
                        reserved = reserve(end, end + min(written, AHEAD))
                    _write(target, chunk, written)
                    written += len(chunk)
                if opened.total is not None and written != opened.total:  # http.client does not say so
                    raise ConnectionError(f"it broke off at byte {written} of {opened.total}")
            resize(target, written)
            if opened.total is None and written != ended and _is_torn(target):
                ended, written, tag = written, 0, ""
                raise ConnectionError(f"it ended at byte {ended}, before its tar did")
            return
        except _Refused as error:
            raise Unreachable(str(error)) from error
        except (OSError, http.client.HTTPException, EOFError) as error:
            failures = 1 if written > furthest else failures + 1
            furthest = max(furthest, written)
            if failures == ATTEMPTS:
                raise Unreachable(f"{kind_and_line(error)}, {ATTEMPTS} times in a row") from error
            time.sleep(FIRST_PAUSE * 2 ** (failures - 1) * random.uniform(0.5, 1))


def _is_torn(target: Path) -> bool:
    """Whether it begins as a tar does and does not end as one."""
    with open(target, "rb", buffering=0) as file:
        try:
            return read_headers(file.fileno(), target.stat().st_size).torn
        except NotATar:
            return False


def resize(target: Path, size: int) -> None:
    """Make the file as large as it will be, so that others who look for room see what is still to come."""
    try:
        with open(target, "ab") as file:
            file.truncate(size)
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error


def _write(target: Path, chunk: bytes, offset: int) -> None:
    try:
        with open(target, "r+b") as file:
            file.seek(offset)
            file.write(chunk)
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error


def _chunks(opened: _Opened) -> Iterator[bytes]:
    while chunk := opened.stream.read(CHUNK):
        yield chunk


@contextmanager
def _open(source: str, offset: int, tag: str) -> Iterator[_Opened]:
    if source.startswith(PIPE):
        opener = _command(source.removeprefix(PIPE).strip())
    elif source.startswith(("http://", "https://")):
        opener = _web(source, offset, tag)
    else:
        opener = _store(source, offset)
    with opener as opened:
        yield opened


@contextmanager
def _web(source: str, offset: int, tag: str) -> Iterator[_Opened]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "ldm"}
    if offset and tag:  # without a tag, what comes now might be of another file than what came before
        headers |= {"Range": f"bytes={offset}-", "If-Range": tag}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(source, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise _Refused(f"the server answers {error.code} {error.reason}") from error
        raise
    with answer:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        begin = offset if answer.status == 206 else 0
        if begin and not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            raise ConnectionError("the server sent another range than was asked for")
        tag = answer.headers.get("ETag", "")
        tag = tag if tag.startswith('"') else ""  # a weak one (W/"...") does not promise equal bytes
        yield _Opened(answer, begin, None if total is None else begin + total, tag)


@contextmanager
def _store(source: str, offset: int) -> Iterator[_Opened]:
    try:
        system, path = file_system(source)
        total = system.size(path)
        with system.open(path, "rb", block_size=8 * CHUNK, cache_type="readahead") as stream:
            begin = offset if total is not None and offset < total else 0
            stream.seek(begin)
            yield _Opened(stream, begin, total)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise _Refused(kind_and_line(error)) from error
    except OSError:
        raise
    except Exception as error:
        if type(error).__module__.startswith(("ldm.", "builtins")):
            raise  # ours, or a fault of this program
        raise ConnectionError(kind_and_line(error)) from error  # stores have exceptions of their own


@contextmanager
def _command(command: str) -> Iterator[_Opened]:
    bash = shutil.which("bash")  # of `a | b`, a plain shell says how b ended and not that a failed
    words = [bash, "-o", "pipefail", "-c", command] if bash else ["sh", "-c", command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield _Opened(process.stdout, 0, None)
        if process.wait():
            raise ConnectionError(f"the command ended with exit code {process.returncode}")
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.terminate()
            process.wait()
