"""What the benchmarks share: sides that take turns, fresh processes, and this process' memory.

The sides of a comparison take turns in one process, none is always the first, and what counts is the ratio in each
round: a machine that has other things to do slows all of them.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ldm.errors import UserError

Seconds = dict[str, list[float]]  # of each side's turns


def take_turns(sides: Mapping[str, Callable[[], Callable[[], object]]], rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds by the clock and of the processor of what each side makes ready (which is not timed), `rounds` times."""
    names, wall, cpu = list(sides), {name: [] for name in sides}, {name: [] for name in sides}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            work = sides[name]()
            begun, used = time.perf_counter(), time.process_time()
            work()
            wall[name].append(time.perf_counter() - begun)
            cpu[name].append(time.process_time() - used)
            del work  # what stands behind it ends before the next one is made
    return wall, cpu


def ratios(seconds: Seconds, ours: str, theirs: str) -> list[float]:
    """How many times as fast as theirs ours was, in each round."""
    return [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]


def spread(values: Sequence[float], unit: str = "", of: str = "") -> str:
    """ "1.020x (0.991 to 1.043 of it)": the median, the least and the largest."""
    return f"{statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f}{of})"


def child(words: Sequence[str]) -> str:
    """Run a Python script, return what it printed; raises UserError with its last words if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"{words[0]} ended with exit code {done.returncode}: {last.removeprefix('error: ')}")
    return done.stdout


def resident(name: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); raises UserError but on Linux."""
    try:  # not getrusage: its peak begins, on Linux, with that of the process that started this one
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError as error:
        if name == "VmHWM":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
        raise UserError("memory is read from /proc/self/status, which exists only on Linux; measure there") from error
    return int(lines[name].split()[0]) * 1024
