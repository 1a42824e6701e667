"""Errors are for people: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

FEW = 12  # names; a sentence lists no more


class UserError(Exception):
    """Something the caller can mend. The message is one sentence and is shown without a traceback.

    It may quote a stranger's file, so what is not printable in it (line breaks, a terminal's control codes) is a space.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class MemoryNotice(UserWarning):
    """The memory did not suffice, and it was done in smaller pieces; the message says in which."""


def printable(text: str) -> str:
    """`text` on one line, without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of what an error says, `most` letters of it; the name of its type where it says nothing."""
    text = str(getattr(error, "problem", None) or error).strip()  # yaml's errors begin with what it was doing
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):  # torch's title; then come the names
        lines = lines[1:]
    return lines[0][:most] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """The same behind the name of its type: "ConnectionError: refused"."""
    line, kind = first_line(error), type(error).__name__
    return kind if line == kind else f"{kind}: {line}"


def instead(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: the one of `names` that is like it, and, if few, all of them."""
    known = list(names)
    near = nearest(word, known)
    ends = [f"did you mean '{near}'?"] if near else []
    ends += [f"{'There' if near else 'there'} are {', '.join(known)}"] if len(known) <= FEW else []
    return f"; {' '.join(ends)}" if ends else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that `name` is a slip of, as far as can be told; empty where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), "")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how Python, a GPU or a CPU says that it has not the memory that was asked for."""
    said = ("DefaultCPUAllocator", "Storage size calculation overflowed", "unpacking long long")
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or any(words in str(error) for words in said)


def explain_os_error(error: OSError, doing: str) -> UserError:
    """Turn an operating-system error met while `doing` ("writing out/a.png") into a sentence."""
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return UserError(f"no space left on the disk while {doing}; free some space or choose another folder")
    if error.errno == errno.EFBIG:
        return UserError(f"the file-size limit was reached while {doing}; raise the limit or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"permission denied while {doing}; choose a path that you may read and write")
    file = error.filename2 or error.filename
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError(f"there is a file where a folder is needed ({file}) while {doing}; choose another path")
    if error.errno == errno.EISDIR:
        return UserError(f"there is a folder where a file is needed ({file}) while {doing}; choose another path")
    if error.errno == errno.ENOENT:
        return UserError(f"no such file or folder ({file}) while {doing}; check the path")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"the name is too long while {doing}; choose a shorter one")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(f"too many files are open while {doing}; raise the limit by ulimit -n")
    return UserError(f"{error.strerror or error} while {doing}")
