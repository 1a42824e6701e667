"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError, explain_os_error


class Taken(Exception):
    """There is a file of that name already."""


@contextmanager
def atomic_write(path: str | Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it becomes `path` when the block ends without error.

    With `new` raises Taken if there is a file at `path` by then, whoever made it. Raises UserError if the folder cannot
    be made or written, or the disk is full; the old file then stays as it was and the temporary one is removed.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; a result is as readable as any other
        if new:
            _claim(path, temporary)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, f"writing {path}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, content: bytes, new: bool = False) -> None:
    """Write `content` to `path` atomically."""
    with atomic_write(path, new) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | Path, content: str, new: bool = False) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    atomic_write_bytes(path, content.encode("utf-8"), new)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; raises UserError if it is missing, unreadable or in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error


def _claim(path: Path, temporary: Path) -> None:
    """Give a file a name that no other process has or gets, over a network too; raises Taken."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(temporary, path)
    except FileExistsError as error:
        raise Taken(str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
