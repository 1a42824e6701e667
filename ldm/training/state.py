"""What a run must remember to go on: one file for each saved step, written whole or not at all."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.files import atomic_write

KEPT = 2  # the newest, and one more in case the newest cannot be read


def save_state(output: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, containers of them) as the state after `step` optimizer steps.

    Raises UserError if the disk does not take it; the states before then stay as they are.
    """
    path = output / "state" / f"{step:08d}.pt"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # When a write fails torch still closes its archive, and complains of that instead.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for old in _saved(output)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def load_state(output: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest state that can be read, with its step; None if there is none.

    Nothing in the file is executed. A damaged newest file is reported and the one before it is used;
    if none can be read, raises UserError.
    """
    paths = _saved(output)
    for path in reversed(paths):
        try:
            return int(path.stem), torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way; the one before it may still do
            reason = str(error).strip().splitlines()
            print(f"warning: {path} cannot be read ({reason[0][:120] if reason else error})", file=sys.stderr)
    if paths:
        raise UserError(f"no state in {output / 'state'} can be read; start in another output folder, or remove it")
    return None


def _saved(output: Path) -> list[Path]:
    return sorted(p for p in (output / "state").glob("*.pt") if re.fullmatch(r"\d{8}", p.stem))
