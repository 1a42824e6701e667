"""The local copies of remote shards: one folder for all processes of a machine, kept below a size.

A copy is made under a lock, so that of several readers one transfers and the others wait. Who reads holds a shared
lock on the open copy; when room is needed, the copies that were used longest ago and that nobody reads go first. If
all are being read, the oldest goes all the same: its readers keep it until they close it, so the run goes on, and the
disk holds that much more for a while. So it does when the transfers under way are by themselves more than the size.

Who transfers holds a lock on the half-made copy, so one whose maker died is known by that, and no clock is asked. A
copy is on the disk before it has its name: after a power loss it is whole or not there.

A copy is taken for what its source holds for as long as it is there: shards that change keep no name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldm.config import DataConfig
from ldm.data.fetch import Unreachable, fetch, resize
from ldm.data.index import ShardIndex, dump, index_file, parse
from ldm.data.records import shown
from ldm.data.sources import PIPE, base_name, is_file
from ldm.errors import UserError, explain_os_error
from ldm.files import atomic_write_bytes

logger = logging.getLogger(__name__)

LOCKS = 64  # files that serialise transfers; two sources that share one merely wait for each other
INDEX_LIMIT = 2**28  # bytes of an index beside a shard: millions of samples


@dataclass(frozen=True)
class Store:
    """How sources are reached: files where they lie, everything else through copies in `folder`."""

    folder: Path
    limit: int  # bytes that the copies take, at most
    allow_pipe: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> Store:
        """Raises UserError for a cache without room."""
        if config.cache_gb <= 0:
            raise UserError(f"data.cache_gb is {config.cache_gb:g}; remote shards need room for one at least")
        return cls(Path(config.cache or _home()).expanduser(), int(config.cache_gb * 1e9), config.allow_pipe)

    def path(self, source: str) -> Path:
        """Where a source is, or its copy would be."""
        if is_file(source):
            return Path(source)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", base_name(source))[-60:]
        return self.folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}-{name}"

    def beside(self, source: str, what: str) -> Path:
        """Where what is known of a remote source is kept, whether its copy is there or not."""
        return self.folder / f".{what}-{self.path(source).name}"

    def open(self, source: str) -> BinaryIO:
        """The source or a whole copy of it, for reading at any offset.

        Raises Unreachable when a source cannot be had, OSError when a file cannot be opened, UserError when the cache
        cannot be written.
        """
        path = self.path(source)
        if is_file(source):
            return open(path, "rb", buffering=0)
        while True:
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
            except (FileNotFoundError, NotADirectoryError):
                self._copy(source, path)
                continue
            _lock(file.fileno(), shared=True)
            now = time.time_ns()
            os.utime(file.fileno(), ns=(now, now))  # a file system's own clock may tick in steps of milliseconds
            return file

    def index(self, source: str) -> ShardIndex:
        """What a remote source holds, without a transfer of all of it if that can be avoided.

        The index that an earlier run kept is taken, then one that lies beside the source (`x.tar.index`, which
        tools/check_shards.py --index makes), else the source is copied and indexed. Raises like `open`, and NotATar.
        """
        kept = self.beside(source, "index")
        if kept.exists() and (index := parse(kept.read_bytes(), source)):
            return index
        index = self._beside(source)
        if index is None:
            with self.open(source) as file:
                index = index_file(file.fileno(), source)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(kept, dump(index))
        return index

    def read(self, source: str) -> bytes:
        """The content of a small source as it is now, of which no copy is kept. Raises like `open`."""
        if not is_file(source):
            self.forget(source)
        with self.open(source) as file:
            content = file.read(INDEX_LIMIT)
        if not is_file(source):
            self.forget(source)
        return content

    def forget(self, source: str) -> None:
        """Remove the copy of a source and what is kept of it: they are not what was expected."""
        for each in (self.path(source), self.beside(source, "index"), self.beside(source, "shapes")):
            with suppress(FileNotFoundError, NotADirectoryError):
                each.unlink()

    def _beside(self, source: str) -> ShardIndex | None:
        if source.startswith(PIPE):
            return None
        url, mark, query = source.partition("?")
        try:
            content = self.read(f"{url}.index{mark}{query}")
        except Unreachable:
            return None
        return parse(content, source)

    def _copy(self, source: str, path: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f".lock-{lock_of(source):02d}"):
                if path.exists():
                    return  # another process made it while this one waited
                part = path.with_name(f".{path.name}.part")
                with _owned(part) as file:
                    fetch(source, part, lambda least, wish: self._reserve(part, least, wish))
                    os.fsync(file)
                    os.replace(part, path)
        except OSError as error:
            raise explain_os_error(error, f"copying a shard into {self.folder}") from error

    def _reserve(self, part: Path, least: int, wish: int) -> int:
        """Make a half-made copy `wish` bytes long, or as long as there is room for and `least` at least."""
        if least > self.limit:
            raise Unreachable(
                f"its {least / 1e9:.3g} GB are more than the cache of {self.limit / 1e9:.3g} GB; raise data.cache_gb"
            )
        with _locked(self.folder / ".lock-room"):
            size = self._make_room(part, least, wish)
            resize(part, size)  # before the next one looks what is taken
        return size

    def _make_room(self, part: Path, least: int, wish: int) -> int:
        copies, taken = [], 0
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            half_made = path.name.endswith(".part")
            if path == part:
                continue
            if half_made and not _is_held(path):  # its maker died
                path.unlink(missing_ok=True)
                continue
            taken += status.st_size
            if not half_made and not path.name.startswith("."):
                copies.append((status.st_mtime, status.st_size, path))
        for only_idle, size in ((True, wish), (False, least)):
            for entry in sorted(copies):
                if taken + size <= self.limit:
                    break
                if not only_idle:
                    _warn_once(self.folder)
                elif _is_held(entry[2]):
                    continue
                entry[2].unlink(missing_ok=True)
                copies.remove(entry)
                taken -= entry[1]
        if taken + least > self.limit:
            _warn_once(self.folder)
        return max(least, min(wish, self.limit - taken))


def lock_of(source: str) -> int:
    """The number of the lock under which a source is copied; a few sources share each."""
    return int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) % LOCKS


def _home() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(base, "ldm", "shards")


_warned: set[Path] = set()


def _warn_once(folder: Path) -> None:
    if folder not in _warned:
        _warned.add(folder)
        logger.warning("%s is smaller than what is read from it at once; raise data.cache_gb", shown(str(folder)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        _lock(file.fileno())
        yield


@contextmanager
def _owned(part: Path) -> Iterator[int]:
    """Make a file that is locked for as long as the block takes, and gone after it unless it has another name then."""
    while True:
        with open(part, "ab") as file:
            _lock(file.fileno())
            try:
                if not os.path.samestat(os.fstat(file.fileno()), part.stat()):
                    continue  # it was taken for a dead one's before it was locked
            except FileNotFoundError:
                continue
            try:
                yield file.fileno()
            finally:
                part.unlink(missing_ok=True)
            return


def _lock(file: int, shared: bool = False) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise UserError("this system has no file locks, which copies of remote shards need; copy them here") from error
    fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def _is_held(path: Path) -> bool:
    """Whether a copy is being read, or made."""
    import fcntl

    try:
        with open(path, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
