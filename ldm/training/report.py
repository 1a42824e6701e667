"""What a run says: the plan before step 0, a JSON line for each logged step, a bar on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from ldm.files import atomic_write_text

Value = float | int | str | Sequence[str]
SHOWN_BY_THE_BAR = ("loss", "images_per_s", "waiting")
UNSPOKEN = "levels/"  # keys that begin so are for the file and the trackers: too many for a terminal


class Report:
    """Log of one run in `output/log.jsonl`; only the main process makes one.

    Lines after `step` (of a run that died beyond its last saved state) are dropped, so that the log of a
    resumed run reads like that of one that was never interrupted. Lines that a full disk does not take are kept in
    memory and written with the next.
    """

    def __init__(self, output: Path, step: int, steps: int):
        self.path = output / "log.jsonl"
        self.waiting: list[str] = []
        self._drop_after(step)
        self.begun, self.first, self.steps = time.monotonic(), step, steps
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        self._show(lambda: self.bar.write(text, file=sys.stdout))
        self._show(sys.stdout.flush)

    def line(self, step: int, values: Mapping[str, Value]) -> None:
        """Append {"step": step, ...} to the log and show it."""
        entry = {"step": step, **{key: _short(value) for key, value in values.items()}}
        self.waiting.append(json.dumps(entry) + "\n")
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", encoding="utf-8") as log:
                    log.write("".join(self.waiting))
            except OSError:
                if self.path.exists():  # half a line, which would spoil the next one
                    with open(self.path, "r+", encoding="utf-8") as log:
                        log.truncate(size)
                raise
            self.waiting.clear()
        except OSError as error:
            warning = f"warning: {self.path} waits with {len(self.waiting)} lines: {error.strerror}"
            self._show(lambda: print(warning, file=sys.stderr))
        said = [f"{key} {value}" for key, value in entry.items() if key != "step" and not key.startswith(UNSPOKEN)]
        self.say(f"step {step:>7}  " + "  ".join([*said, *self._left(step)]))
        self.bar.set_postfix({key: entry[key] for key in SHOWN_BY_THE_BAR if key in entry}, refresh=False)

    def back_to(self, step: int) -> None:
        """The run goes on from an earlier step: what the log says beyond it did not happen."""
        self._drop_after(step)
        self.begun, self.first = time.monotonic(), step
        self.bar.n = step
        self._show(self.bar.refresh)

    def advance(self) -> None:
        self._show(self.bar.update)

    def close(self) -> None:
        self._show(self.bar.close)

    def _show(self, show: Callable[[], object]) -> None:
        """Whoever looked on may have gone, with his terminal or the other end of a pipe; that is no end of a run."""
        try:
            show()
        except OSError:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    with suppress(OSError):  # what waits in the stream must go somewhere
                        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def _left(self, step: int) -> list[str]:
        """The time that is left, where no bar says it: ["left 1:23:45"]."""
        done = step - self.first
        if not self.bar.disable or done <= 0 or step >= self.steps:
            return []
        seconds = (self.steps - step) * (time.monotonic() - self.begun) / done
        return [f"left {timedelta(seconds=round(seconds))}"]

    def _drop_after(self, step: int) -> None:
        self.waiting = [line for line in self.waiting if json.loads(line)["step"] <= step]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            atomic_write_text(self.path, "".join(kept) if step else "")


def _short(value: Value) -> Value:
    """Six digits; what is not finite as a word, for JSON has no number for it."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
