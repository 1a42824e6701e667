"""A training's folder, as those see it who look for a model in it: how far the training is. No torch in here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.plain import read_json

ADAPTERS = {"lora.safetensors": ("a LoRA", "--lora"), "embedding.safetensors": ("a word", "--embedding")}
"""What a training leaves that is not a model -> what it is, and the option that puts it over one."""


def why_no_model(path: Path) -> str:
    """Why `path`, which a training wrote, is not a model, or not yet; empty for a model and for all that is foreign."""
    run = path if path.is_dir() else path.parent
    within = run.name == "state"  # or is that folder itself
    run = run.parent if within else run
    steps, planned = saved_steps(run), planned_steps(run)
    how = f"python tools/export_state.py {run} NEW_FOLDER makes a model of a state"
    if within and planned is not None:
        return f"{path} is what a training goes on from, not a model; {how}"
    if path != run or (path / "model.json").exists() or (planned is None and not steps):
        return ""
    for name, (what, option) in ADAPTERS.items():
        if (path / name).exists():
            return f"{path} has {what}, which goes over a model; say {option} {path / name} beside the model"
    if not steps:
        return f"the training in {path} has not saved a state yet, so there is no model; go on with it by --resume auto"
    return f"the training in {path} has not finished ({_progress(steps, planned)}); go on by --resume auto, or {how}"


def gone_on(run: Path) -> str:
    """A sentence if the training in `run` has a model and has gone on since, without coming to its end; else empty."""
    steps, planned = saved_steps(run), planned_steps(run)
    if not steps or planned is None or steps[-1] >= planned:
        return ""
    state = run / "state" / f"{steps[-1]:08d}.pt"
    try:
        if state.stat().st_mtime <= (run / "model.json").stat().st_mtime:
            return ""
    except FileNotFoundError:  # pruned since it was listed, by a training that has saved others
        pass
    return (
        f"the training in {run} has gone on since its model was written ({_progress(steps, planned)}); "
        "tools/export_state.py makes a model of its state"
    )


def saved_steps(run: Path) -> list[int]:
    """The steps that have a state, in rising order; damaged ones too."""
    return sorted(int(path.stem) for path in (run / "state").glob("*.pt") if re.fullmatch(r"\d{8}", path.stem))


def planned_steps(run: Path) -> int | None:
    """How many steps the training in `run` was told to do; None if no training's settings lie there."""
    if not (run / "config.json").is_file():
        return None
    try:
        loop: Any = read_json(run / "config.json").get("loop")
    except UserError:  # whoever reads it for its own sake says what is wrong
        return None
    steps = loop.get("steps") if isinstance(loop, dict) else None
    return steps if isinstance(steps, int) else None


def _progress(steps: list[int], planned: int | None) -> str:
    return f"its last state is of step {steps[-1]}" + ("" if planned is None else f" of {planned}")
