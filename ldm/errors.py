"""Errors are for people: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the caller can mend. The message is one sentence and is shown without a traceback.

    It may quote a stranger's file, so what is not printable in it (line breaks, a terminal's control codes) is a space.
    """

    def __init__(self, message: str):
        super().__init__("".join(letter if letter.isprintable() else " " for letter in message))


def instead(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: the one of `names` that is like it, and, if few, all of them."""
    known = list(names)
    near = difflib.get_close_matches(word, known, n=1)
    ends = [f"did you mean '{near[0]}'?"] if near else []
    ends += [f"{'There' if near else 'there'} are {', '.join(known)}"] if len(known) <= 20 else []
    return f"; {' '.join(ends)}" if ends else ""


def explain_os_error(error: OSError, doing: str) -> UserError:
    """Turn an operating-system error met while `doing` ("writing out/a.png") into a sentence."""
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return UserError(f"no space left on the disk while {doing}; free some space or choose another folder")
    if error.errno == errno.EFBIG:
        return UserError(f"the file-size limit was reached while {doing}; raise the limit or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"permission denied while {doing}; choose a folder you may write to")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UserError(f"no such file or folder ({error.filename}) while {doing}; check the path")
    return UserError(f"{error.strerror or error} while {doing}")


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; user errors end in one sentence and exit code 1, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished before is on disk, nothing is half-written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing to say and nobody to hear it
        sys.exit(1)
