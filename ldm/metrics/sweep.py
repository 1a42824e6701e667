"""Curves: the same evaluation at each combination of some settings; quality against cost, precision against recall."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.metrics import protocol
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing
from ldm.metrics.generation import Against, evaluate_model
from ldm.metrics.plots import new_figure, png
from ldm.metrics.tables import short, space_of
from ldm.model import Model

Axes = Mapping[str, Sequence[Any]]
KINDS: dict[str, type] = {
    "cfg": float,
    "steps": int,
    "eta": float,
    "cfg_rescale": float,
    "sampler": str,
    "spacing": str,
}
ANNOTATED = 24  # points of a plot, at most, of which each is labelled


def parse_axes(words: Sequence[str]) -> dict[str, list[Any]]:
    """["cfg=1,2", "steps=10,20"] -> {"cfg": [1.0, 2.0], "steps": [10, 20]}. Raises UserError."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in KINDS or not values.strip(","):
            raise UserError(f"--sweep takes {', '.join(KINDS)} as name=value,value and got '{word}'")
        try:
            axes[name] = [KINDS[name](value) for value in values.split(",") if value]
        except ValueError as error:
            raise UserError(f"--sweep {word} is invalid: the values of {name} are numbers") from error
    return axes


@dataclass(frozen=True)
class Cell:
    """One way to draw among others: what is varied and, with that in its settings, what is drawn."""

    name: str
    varied: dict[str, Any]
    drawing: Drawing


def name_of(varied: Mapping[str, Any]) -> str:
    """{"cfg": 1.5, "steps": 4} -> "cfg1.5-steps4", for files and folders."""
    parts = (f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}" for key, value in varied.items())
    return "-".join(parts).replace(" ", "_")


def cells(axes: Axes, drawing: Drawing) -> list[Cell]:
    """A cell for each combination of the values of `axes`, the last axis fastest. Raises UserError."""
    found = []
    for values in product(*axes.values()):
        varied = dict(zip(axes, values, strict=True))
        settings = replace(drawing.settings, **varied)
        settings.check()
        found.append(Cell(name_of(varied), varied, replace(drawing, settings=settings)))
    return found


def sweep(
    model: Model,
    drawing: Drawing,
    axes: Axes,
    against: Against,
    folder: Path,
    crew: Crew,
    weights: str = "auto",
) -> list[dict[str, Any]]:
    """Draw and measure each combination into `folder`; sweep.csv, sweep.png and a result for each are written there.

    Every combination has the same captions and seeds. Returns the rows of the table.
    """
    rows = measure(model, cells(axes, drawing), against, folder, crew, weights)
    if crew.main:
        atomic_write_bytes(folder / "sweep.png", plot(rows, tuple(axes)))
    return rows


def measure(
    model: Model,
    cells: Sequence[Cell],
    against: Against,
    folder: Path,
    crew: Crew,
    weights: str = "auto",
) -> list[dict[str, Any]]:
    """A row for each cell: what is varied, the number of pictures, the evaluations that one cost, the figures.

    Pictures, sweep.csv and a result with its protocol for each cell are written into `folder`; what is drawn already
    is not drawn again. The main process alone gets rows.
    """
    rows = []
    for cell in cells:
        found = evaluate_model(model, cell.drawing, against, folder / cell.name, crew, weights)
        if crew.main:
            protocol.write(found, folder / f"{cell.name}.json")
            cost = {"pictures": cell.drawing.count, "evaluations": found["cost"]["evaluations"]}
            rows.append({**cell.varied, **cost, **found["figures"]})
            atomic_write_text(folder / "sweep.csv", as_csv(rows))  # after each: a sweep that is stopped has its rows
    return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> bytes:
    """A PNG with a row of panels for each space: the distance against evaluations, and precision against recall.

    A line follows what is varied last; there is one for each combination of the others. Raises UserError without
    matplotlib.
    """
    *others, along = varied
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(" ".join(f"{name} {short(row[name])}" for name in others), []).append(row)
    names = [name for name in rows[0] if space_of(name)]
    spaces = list(dict.fromkeys(map(space_of, names)))
    figure = new_figure(11, 4.5 * len(spaces))
    for place, space in enumerate(spaces):
        distance = next((n for n in (f"{d}[{space}]" for d in ("FID", "FD", "KID", "KD", "CMMD")) if n in names), None)
        for column, (x, y) in enumerate([("evaluations", distance), (f"recall[{space}]", f"precision[{space}]")]):
            if y not in names or (column and x not in names):
                continue
            panel = figure.add_subplot(len(spaces), 2, 2 * place + column + 1, xlabel=x, ylabel=y)
            for number, (label, those) in enumerate(lines.items()):
                points = sorted(those, key=lambda row: row["evaluations"])
                panel.plot([r[x] for r in points], [r[y] for r in points], "osv^D"[number % 5] + "-", label=label, ms=4)
                for row in points if len(rows) <= ANNOTATED else []:
                    said = f"{along} {short(row[along])}"
                    panel.annotate(said, (row[x], row[y]), textcoords="offset points", xytext=(4, 4), fontsize=7)
            if not column:
                panel.set_xscale("log")
                panel.set_yscale("log" if min(row[y] for row in rows) > 0 else "linear")
            panel.grid(alpha=0.3)
            if others:
                panel.legend(fontsize=7, ncols=2 if len(lines) > 8 else 1)
    return png(figure)
