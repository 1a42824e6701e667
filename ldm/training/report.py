"""What a run says: the plan before step 0, a JSON line for each logged step, a bar on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from ldm.errors import explain_os_error
from ldm.files import atomic_write_text


class Report:
    """Log of one run in `output/log.jsonl`; only the main process makes one.

    Lines after `step` (of a run that died beyond its last saved state) are dropped, so that the log of a
    resumed run reads like that of one that was never interrupted.
    """

    def __init__(self, output: Path, step: int, steps: int):
        self.path = output / "log.jsonl"
        self.started = time.monotonic()
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            atomic_write_text(self.path, "".join(kept) if step else "")
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def line(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append {"step": step, ...} to the log and show it; raises UserError when the disk is full."""
        entry = {"step": step, **{key: _short(value) for key, value in values.items()}}
        try:
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise explain_os_error(error, f"writing {self.path}") from error
        self.say(f"step {step:>7}  " + "  ".join(f"{key} {value}" for key, value in entry.items() if key != "step"))

    def advance(self) -> None:
        self.bar.update(1)

    def close(self) -> None:
        self.bar.close()


def _short(value: float | int | str) -> float | int | str:
    return float(f"{value:.6g}") if isinstance(value, float) else value
