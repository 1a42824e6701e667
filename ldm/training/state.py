"""What a run must remember to go on: files for each saved step, written whole or not at all, and known by their hash.

    state/00000500.pt        tensors and numbers, as torch.save writes them
    state/00000500.0of4.pt   what process 0 of 4 holds of sharded tensors (sharding.py), where there are any
    state/00000500.sha256    the hashes of these files, as `sha256sum -c` reads them; written last

Each file is whole or not there, so a step without the third one can be used all the same: it was cut off between the
two, or is of an older version of this program.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.run_folder import saved_steps
from ldm.errors import UserError, first_line
from ldm.files import atomic_write, atomic_write_text

UNUSED = ".pt.unused"  # end of the names of states that were set aside
KEPT = 2  # the newest, and one more in case the newest cannot be read


@dataclass(frozen=True)
class Keep:
    """Which states stay when a new one has been written."""

    last: int = KEPT
    every: int = 0  # optimizer steps; states at multiples of it stay for ever; 0: none

    def drops(self, steps: list[int], needed: int = 0) -> list[int]:
        """Of the saved `steps`, in rising order, those to delete; `needed` stays."""
        return [s for s in steps[: -self.last] if s != needed and not (self.every and s % self.every == 0)]


def save_state(output: Path, step: int, state: dict[str, Any], keep: Keep = Keep(), needed: int = 0) -> Path:
    """Write `state` (tensors, numbers, strings, containers of them) as the state after `step` optimizer steps.

    Then the states that `keep` does not keep are deleted. Raises UserError if the disk does not take it; the states
    before then stay as they are.
    """
    path = write_part(output, step, "", state)
    finish(output, step, keep, needed)
    return path


def write_part(output: Path, step: int, part: str, state: dict[str, Any]) -> Path:
    """One file of a state, atomically; `finish` makes of all its files a state. Raises UserError as save_state does."""
    path = output / "state" / f"{step:08d}{part}.pt"
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # When a write fails torch still closes its archive, and complains of that instead.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        # A step that is saved anew (guard.py): whoever is killed before `finish` must not leave the old hash beside
        # the new file, which would count as damaged and may be the only one.
        _hashes(output, step).unlink(missing_ok=True)
    return path


def finish(output: Path, step: int, keep: Keep = Keep(), needed: int = 0) -> None:
    """Write the hashes of the files of `step`, and delete what `keep` does not keep.

    States that were set aside go too, once the run has come by them again.
    """
    lines = [f"{_digest(path)}  {path.name}\n" for path in _parts(output, step)]
    atomic_write_text(_hashes(output, step), "".join(lines))
    for old in keep.drops(saved_steps(output), needed):
        _delete(output, old)
    for aside in (output / "state").glob(f"*{UNUSED}"):
        if aside.name[:8].isdigit() and int(aside.name[:8]) <= step:
            aside.unlink(missing_ok=True)


def load_state(output: Path, most: int | None = None, mapped: bool = False) -> tuple[int, dict[str, Any]] | None:
    """The newest state that is whole, of step `most` or before, with its step; None if there is none.

    `mapped`: its tensors are views of the file, for whoever wants few of them.

    Nothing in the file is executed. A damaged newest state is reported and the one before it is used;
    if none can be read, raises UserError.
    """
    steps = [step for step in saved_steps(output) if most is None or step <= most]
    for step in reversed(steps):
        try:
            _verify(output, step)
            return step, read_part(output, step, mapped=mapped)
        except Exception as error:  # a damaged file can fail in any way; the one before it may still do
            path = _main(output, step)
            print(f"warning: {path} cannot be read ({first_line(error, 120)})", file=sys.stderr)
    if steps:
        raise UserError(f"no state in {output / 'state'} can be read; start in another output folder, or remove it")
    return None


def read_part(output: Path, step: int, part: str = "", check: bool = False, mapped: bool = False) -> dict[str, Any]:
    """One file of a state; with `check` raises ValueError unless it has its hash. `mapped`: as of load_state."""
    path = output / "state" / f"{step:08d}{part}.pt"
    if check:
        _verify(output, step, path.name)
    # Of others' shares few rows are wanted: these are mapped, not read.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True if part or mapped else None)


def tidy(output: Path, step: int) -> None:
    """Before a run goes on from `step`: nothing half-written by a killed process, and nothing from beyond that step.

    States beyond it, damaged ones or of a branch that was given up, would be taken for the newest; they are renamed,
    and deleted when the run has come by them again (`finish`). Pictures and snapshots of averages from beyond it are
    deleted: a reconstruction would mix them with those of the branch that counts.
    """
    for half in [half for folder in (".", "state", "ema", "samples") for half in (output / folder).glob(".*.tmp")]:
        half.unlink(missing_ok=True)
    for beyond in saved_steps(output):
        if beyond > step:
            # The main file first: without it the others are no state, so half of this is no harm.
            for path in sorted(_parts(output, beyond), key=lambda path: path != _main(output, beyond)):
                path.replace(path.with_suffix(UNUSED))
            _hashes(output, beyond).unlink(missing_ok=True)
    for pattern in ("ema/*.safetensors", "samples/*.png"):
        for path in output.glob(pattern):
            if (of := re.search(r"(?:^|-)(\d{8})$", path.stem)) and int(of[1]) > step:
                path.unlink(missing_ok=True)


def _verify(output: Path, step: int, only: str = "") -> None:
    """Raises ValueError or OSError unless each file, or `only` this one, has the hash that was written with it."""
    hashes = _hashes(output, step)
    if not hashes.exists():
        return
    for line in hashes.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if only in ("", name) and _digest(output / "state" / Path(name).name) != digest:
            raise ValueError(f"{name} is not what was written: its SHA-256 differs")


def _main(output: Path, step: int) -> Path:
    return output / "state" / f"{step:08d}.pt"


def _hashes(output: Path, step: int) -> Path:
    return output / "state" / f"{step:08d}.sha256"


def _parts(output: Path, step: int) -> list[Path]:
    return sorted((output / "state").glob(f"{step:08d}*.pt"))


def _delete(output: Path, step: int) -> None:
    _hashes(output, step).unlink(missing_ok=True)
    for path in _parts(output, step):
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
