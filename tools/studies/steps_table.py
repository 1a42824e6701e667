"""The DDIM paper's table (Song et al. 2021, table 1): quality against eta and the number of steps."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch

from ldm.image_io import grid, save_png
from ldm.jobs import Settings
from studies import cells
from studies.cells import SHOWN, Cell, Protocol
from studies.plot import figure
from studies.subject import Subject

ETAS = (0.0, 0.2, 0.5, 1.0)
STEPS = (10, 20, 50, 100, 1000)
LONG = 500  # steps from which a cell has fewer pictures


def make_cells(quick: bool, pictures: int, pictures_of_long: int) -> tuple[Cell, ...]:
    """cfg 1 on the trailing grid, so nothing but eta and the steps is varied."""
    etas, steps = ((0.0, 1.0), (4, 12)) if quick else (ETAS, STEPS)
    return tuple(
        Cell(
            name(eta, n),
            Settings(cfg=1.0, steps=n, sampler="ddim", spacing="trailing", eta=eta),
            pictures_of_long if n >= LONG else pictures,
        )
        for n, eta in product(steps, etas)
    )


def name(eta: float, steps: int) -> str:
    return f"eta{eta:g}-steps{steps}"


def report(protocol: Protocol, subject: Subject, folder: Path) -> None:
    """Print the table of what is there; write it with a plot and a grid of pictures."""
    found = cells.figures(protocol, subject, folder)
    etas = sorted({cell.settings.eta or 0.0 for cell in protocol.cells})
    steps = sorted({cell.settings.steps for cell in protocol.cells})
    tables = []
    for key, what, scale in (("kernel", "kernel distance x 1000", 1000), ("frechet", "Frechet distance", 1)):
        tables.append(
            f"{what} [{protocol.space}] from {len(subject.reference)} real pictures, cfg 1, trailing grid "
            f"(pictures drawn)\n\n{table(found, etas, steps, key, scale)}"
        )
    print("\n\n".join(tables))
    with figure(folder / "steps-table.png", "steps", f"kernel distance x 1000 [{protocol.space}]") as axes:
        for eta in etas:
            there = [(n, found[name(eta, n)]["kernel"] * 1000) for n in steps if name(eta, n) in found]
            axes.plot(*zip(*there, strict=True) if there else ([], []), "o-", label=f"eta {eta:g}")
        axes.axhline(found["autoencoder alone"]["kernel"] * 1000, color="gray", ls=":", label="autoencoder alone")
        axes.set_xscale("log")
        axes.legend()
    drawn = [part.images for _, part in cells.collect(protocol, folder)]
    if drawn:
        save_png(grid(torch.cat(drawn), columns=SHOWN), folder / "steps-table-grid.png", {})
    print(f"\nwrote figures.json, steps-table.png and steps-table-grid.png (a row for each cell) into {folder}")


def table(found: dict[str, dict[str, float]], etas: list[float], steps: list[int], key: str, scale: float) -> str:
    """A Markdown table, a row for each eta; what is not drawn yet is a dash."""

    def show(row: dict[str, float] | None) -> str:
        return "-" if row is None else f"{row[key] * scale:.1f} ({row['pictures']:.0f})"

    lines = [["eta", *(f"{n} steps" for n in steps)], ["---"] * (len(steps) + 1)]
    lines += [[f"{eta:g}", *(show(found.get(name(eta, n))) for n in steps)] for eta in etas]
    floor = f"real pictures through the autoencoder alone: {show(found['autoencoder alone'])}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{floor}"
