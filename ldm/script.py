"""How a script begins and ends. Scripts and tools import this first of all, before anything that takes its time.

Ctrl-C becomes an exception wherever the program is, and SIGTERM too, so that what is half-written is cleared away.
In the middle of an import it would get lost: who can do without a package takes any failure of its import for its
absence (torch then goes on without half of numpy), and compiled code passes another error on. So an import is not
interrupted, it is the end of the process.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

TOLD = "what was finished before is on disk, nothing is half-written\n"
INTERRUPTED, TERMINATED = f"\ninterrupted: {TOLD}", f"terminated: {TOLD}"


class Terminated(KeyboardInterrupt):
    """SIGTERM: for whoever is interrupted the same."""


_stopping = False


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopping
    if _stopping:  # it ends already, and is asked once more
        os._exit(128 + number)
    _stopping = True
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            try:
                os.write(2, (TERMINATED if number == signal.SIGTERM else INTERRUPTED).encode())
            finally:
                os._exit(128 + number)
        frame = frame.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as of jobs in the background
    signal.signal(signal.SIGINT, _stop)
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "RANK" not in os.environ:  # it may wait for another rank
    signal.signal(signal.SIGTERM, _stop)


_ended_well = False


def _leave() -> None:
    """The last thing of a script that ended well. Python would go on to free each object of torch and what stands on
    it, for a second, and all of it is the process' own."""
    program = vars(sys.modules["__main__"])
    ours = program.get("run") is run or getattr(program.get("command"), "__module__", "") == "ldm.__main__"
    if ours and _ended_well:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if not getattr(atexit, "_ncallbacks", lambda: 0)():  # what was registered before is called after: nobody is cut off
    atexit.register(_leave)


LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # which launchers set for what they launch
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "torch/distributed")  # in their command lines


def _launched() -> bool:
    """Whether the parent is a launcher, which may die without a word to this process. (A shell may do so in peace.)"""
    if not any(name in os.environ for name in LAUNCHED):
        return False
    import psutil

    try:
        words = " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return False
    return any(name in words for name in LAUNCHERS)


@cache
def end_with_parent() -> None:
    """Have this process told by SIGTERM, once, when its parent is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    try:
        print(f"warning: process {parent}, which began this one, is gone, so it ends too", file=sys.stderr, flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


_usual = warnings.formatwarning


def _formatted(message: Warning | str, category: type[Warning], *others: Any, **named: Any) -> str:
    """A notice of the library's is a sentence for people; other warnings are as Python shows them."""
    if category.__module__.startswith("ldm."):
        return f"warning: {message}\n"
    return _usual(message, category, *others, **named)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; user errors end in one sentence and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    global _stopping, _ended_well
    from ldm.errors import UserError, out_of_memory  # not above: what is imported there goes before Ctrl-C is heeded

    warnings.formatwarning = _formatted
    if _launched():
        end_with_parent()
    try:
        try:
            main()
            sys.stdout.flush()
            _ended_well = True
        finally:
            _stopping = True  # the launcher, gone for the same Ctrl-C, may be about to be noticed
    except (Exception, KeyboardInterrupt) as error:
        if interrupt := _interrupt_behind(error):
            terminated = isinstance(interrupt, Terminated)
            print(TERMINATED if terminated else INTERRUPTED, end="", file=sys.stderr)
            sys.exit(143 if terminated else 130)
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if out_of_memory(error):
            said = " ".join(str(error).split())[:200]
            print(f"error: the memory does not suffice; make the batch or the model smaller ({said})", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output went away: nothing to say and nobody to hear it
            sys.exit(1)
        raise


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """What `error` is, or came of: clearing up may fail where it is interrupted too early (argparse's does)."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error
