"""Curves of one or several trainings as a picture.

    python tools/plot_run.py runs/ldm
    python tools/plot_run.py runs/a runs/b --keys loss validation/loss --smooth 20 --output curves.png

Reads each run's log.jsonl. One panel for each key that the runs have, one colour for each run; steps that were skipped
and states that were gone back to stand as dotted lines.
"""

from __future__ import annotations

from ldm.script import run

import json
import math
from pathlib import Path
from typing import Any

from ldm.arguments import COUNT, Parser
from ldm.errors import UserError
from ldm.files import atomic_write_bytes, read_text
from ldm.metrics.plots import new_figure, png

USUAL = ("loss", "validation/loss", "validation/psnr", "l1", "images_per_s", "waiting")  # panels unless told otherwise


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training")
    parser.add_argument("--keys", nargs="+", help="what to draw; 'levels' is the loss of all noise levels in one panel")
    parser.add_argument("--smooth", type=COUNT, default=1, help="mean over so many lines of the log")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    logs = {str(path): read_log(path) for path in arguments.runs}
    keys = arguments.keys or [key for key in USUAL if any(key in line for log in logs.values() for line in log)]
    keys += ["levels"] if not arguments.keys and any(map(_levels, logs.values())) else []
    if not keys:
        raise UserError(f"the runs have logged none of {', '.join(USUAL)} yet; wait, or choose others by --keys")
    for key in keys:
        if key != "levels" and not any(key in line for log in logs.values() for line in log):
            there = sorted({name for log in logs.values() for line in log for name in line} - {"step", "event"})
            raise UserError(f"no run logs '{key}'; they log {', '.join(there)}")
    draw(logs, keys, arguments.smooth, arguments.output)
    print(f"wrote {arguments.output}: {', '.join(keys)} of {len(logs)} runs")


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; raises UserError where there is none. A last line that is torn is left out."""
    lines = read_text(output / "log.jsonl" if output.is_dir() else output).splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise UserError(
                    f"line {number + 1} of the log of {output} is not valid JSON; name the output folder of a training"
                ) from error
    if not found:
        raise UserError(f"the log of {output} is empty; wait until the run has written its first line")
    return found


def curve(log: list[dict[str, Any]], key: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    """Steps, and the mean of `key` over the last `smooth` lines that have it."""
    rows = [(line["step"], float(line[key])) for line in log if key in line]
    rows = [row for row in rows if math.isfinite(row[1])]
    values = [value for _, value in rows]
    means = [sum(part := values[max(0, i + 1 - smooth) : i + 1]) / len(part) for i in range(len(values))]
    return [step for step, _ in rows], means


def draw(logs: dict[str, list[dict[str, Any]]], keys: list[str], smooth: int, output: Path) -> None:
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    figure = new_figure(7 * columns, 3.5 * rows, dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(keys) :]:
        panel.remove()
    for key, panel in zip(keys, axes.flat, strict=False):
        panel.set_title(key)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        for number, (name, log) in enumerate(logs.items()):
            colour = f"C{number}"
            for shade, (label, series) in enumerate(
                (each, each) for each in (_levels(log) if key == "levels" else [key])
            ):
                steps, values = curve(log, series, smooth)
                style = {"color": f"C{shade}", "alpha": 1 / (1 + number)} if key == "levels" else {"color": colour}
                panel.plot(steps, values, label=f"{name} {label}" if key == "levels" else name, **style)
            for line in log:
                if "event" in line:
                    panel.axvline(line["step"], color=colour, linestyle=":", linewidth=0.8)
        if "loss" in key or key == "levels":
            panel.set_yscale("log")
        panel.legend(fontsize=7)
    atomic_write_bytes(output, png(figure))


def _levels(log: list[dict[str, Any]]) -> list[str]:
    names = {key for line in log for key in line if key.startswith("levels/")}
    return sorted(names, key=lambda name: float(name.removeprefix("levels/").split("-")[0]))


if __name__ == "__main__":
    run(main)
