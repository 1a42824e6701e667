"""Curves: the same evaluation at each combination of some settings; quality against cost, precision against recall."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.jobs import Settings
from ldm.metrics import protocol
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing
from ldm.metrics.figures import space_of
from ldm.metrics.generation import Against, evaluate_model
from ldm.model import LatentDiffusion

Axes = Mapping[str, Sequence[Any]]
KINDS: dict[str, type] = {
    "cfg": float,
    "steps": int,
    "eta": float,
    "cfg_rescale": float,
    "sampler": str,
    "spacing": str,
}


def parse_axes(words: Sequence[str]) -> dict[str, list[Any]]:
    """["cfg=1,2", "steps=10,20"] -> {"cfg": [1.0, 2.0], "steps": [10, 20]}. Raises UserError."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in KINDS or not values:
            raise UserError(f"--sweep takes {', '.join(KINDS)} as name=value,value and got '{word}'")
        try:
            axes[name] = [KINDS[name](value) for value in values.split(",") if value]
        except ValueError as error:
            raise UserError(f"--sweep {word}: {error}") from error
    return axes


def cells(axes: Axes, settings: Settings) -> list[tuple[str, dict[str, Any], Settings]]:
    """Name, varied values and settings of each combination, the last axis fastest. Raises UserError."""
    assert set(KINDS) <= {field.name for field in fields(Settings)}
    found = []
    for values in product(*axes.values()):
        varied = dict(zip(axes, values, strict=True))
        name = "-".join(
            f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}" for key, value in varied.items()
        )
        made = replace(settings, **varied)
        made.check()
        found.append((name, varied, made))
    return found


def sweep(
    model: LatentDiffusion, drawing: Drawing, axes: Axes, against: Against, folder: Path, crew: Crew
) -> list[dict[str, Any]]:
    """Draw and measure each combination into `folder`; sweep.csv, sweep.png and a result for each are written there.

    Every combination has the same captions and seeds. Returns the rows of the table.
    """
    rows = []
    for name, varied, settings in cells(axes, drawing.settings):
        found = evaluate_model(model, replace(drawing, settings=settings), against, folder / name, crew)
        if crew.main:
            protocol.write(found, folder / f"{name}.json")
            rows.append({**varied, "evaluations": found["cost"]["evaluations"], **found["figures"]})
            atomic_write_text(folder / "sweep.csv", as_csv(rows))  # after each: a sweep that is stopped has its rows
    if crew.main:
        atomic_write_bytes(folder / "sweep.png", plot(rows, axes))
    return rows


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures in a row of the table: what names a space, and the cost."""
    return {name: value for name, value in row.items() if name == "evaluations" or space_of(name)}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Mapping[str, Any]], axes: Axes) -> bytes:
    """A row of panels for each space: the distance against evaluations, and precision against recall; a line for each
    value of the first axis. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need the package matplotlib; install it with pip install 'ldm[plot]'") from error

    names = [name for row in rows[:1] for name in row if "[" in name]
    spaces = list(dict.fromkeys(map(space_of, names)))
    figure = Figure((9, 3.6 * len(spaces)), dpi=100, layout="constrained")
    lines, *others = axes
    for line, space in enumerate(spaces):
        distance = next((n for n in (f"{d}[{space}]" for d in ("FID", "FD", "KID", "KD", "CMMD")) if n in names), None)
        panels = [("evaluations", distance), (f"recall[{space}]", f"precision[{space}]")]
        for column, (x, y) in enumerate(panels):
            if y not in names or (column and x not in names):
                continue
            panel = figure.add_subplot(len(spaces), 2, 2 * line + column + 1, xlabel=x, ylabel=y)
            for index, value in enumerate(axes[lines]):
                chosen = [row for row in rows if row[lines] == value]
                chosen.sort(key=lambda row: row["evaluations"])
                panel.plot(
                    [r[x] for r in chosen], [r[y] for r in chosen], "osv^D"[index % 5] + "-", label=f"{lines} {value}"
                )
                for row in chosen:
                    said = " ".join(f"{name} {row[name]}" for name in others)
                    panel.annotate(said, (row[x], row[y]), textcoords="offset points", xytext=(4, 4), fontsize=7)
            if not column:
                panel.set_xscale("log")
            panel.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
