"""The DDIM paper's table (Song et al. 2021, table 1): quality against eta and the number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ldm.files import atomic_write_bytes
from ldm.jobs import Settings
from ldm.metrics.sweep import plot
from studies.subject import SPACE, Subject

ETAS = (0.0, 0.2, 0.5, 1.0)
STEPS = (10, 20, 50, 100, 1000)
LONG = 500  # steps from which a cell has fewer pictures
FIGURE = f"KD[{SPACE}]"


def run(subject: Subject, quick: bool, pictures: int, pictures_of_long: int) -> None:
    """Print the table; write it with its curves and a grid of pictures. cfg 1 on the trailing grid, so that nothing
    but eta and the steps is varied."""
    axes = {"eta": (0.0, 1.0), "steps": (4, 12)} if quick else {"eta": ETAS, "steps": STEPS}
    cells = [
        subject.cell(
            {"eta": eta, "steps": n},
            Settings(cfg=1.0, steps=n, sampler="ddim", spacing="trailing", eta=eta),
            pictures_of_long if n >= LONG else pictures,
        )
        for eta, n in product(*axes.values())
    ]
    alone = subject.autoencoder_alone()
    rows = subject.measure(cells)
    if not subject.crew.main:
        return
    print(
        f"{FIGURE} x 1000 from {len(subject.against.real)} real pictures, cfg 1, trailing grid (pictures drawn)\n\n"
        f"{table(rows, axes)}\n\nreal pictures through the autoencoder alone: {1000 * alone[FIGURE]:.1f}"
    )
    atomic_write_bytes(subject.folder / "steps-table.png", plot(rows, tuple(axes)))
    subject.save_grid(cells, "steps-table-grid.png")
    print(f"\nwrote sweep.csv, steps-table.png and steps-table-grid.png (a row for each cell) into {subject.folder}")


def table(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> str:
    """A Markdown table of the figure, a line for each eta and a column for each number of steps."""
    found = {(row["eta"], row["steps"]): f"{1000 * row[FIGURE]:.1f} ({row['pictures']})" for row in rows}
    lines = [["eta", *(f"{n} steps" for n in axes["steps"])], ["---"] * (len(axes["steps"]) + 1)]
    lines += [[f"{eta:g}", *(found[eta, n] for n in axes["steps"])] for eta in axes["eta"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
