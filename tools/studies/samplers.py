"""Quality against cost: every sampler's distance from the real pictures, against evaluations of the network."""

from __future__ import annotations

from pathlib import Path

from ldm.catalogue import SAMPLERS
from ldm.jobs import Settings
from studies import cells
from studies.cells import Cell, Protocol
from studies.plot import figure
from studies.subject import Subject

BUDGETS = (6, 12, 24, 48)  # evaluations, about
COST = {"heun": 2, "dpm_2": 2, "dpmpp_sde": 2, "pc": 2, "langevin": 2}  # evaluations a step, where it is not 1
OPTIONS = {"langevin": {"moves": 2}}  # ten, its default, would leave a budget of 12 one level


def make_cells(quick: bool, pictures: int) -> tuple[Cell, ...]:
    """cfg 1. `ode` takes as many evaluations as its tolerance asks for: its steps are tolerances here."""
    names = ("ddim", "dpmpp_2m", "pc", "ode") if quick else tuple(SAMPLERS)
    budgets = (6,) if quick else BUDGETS
    made = []
    for name in names:
        if name == "ode":
            tolerances = (1e-1,) if quick else (1e-1, 1e-2, 1e-3)
            for tolerance in tolerances:
                options = {"rtol": tolerance, "atol": tolerance}
                settings = Settings(cfg=1.0, steps=2, sampler=name, spacing="karras", options=options)
                made.append(Cell(f"{name}-tolerance{tolerance:g}", settings, pictures))
            continue
        for budget in budgets:
            steps, options = budget // COST.get(name, 1), OPTIONS.get(name, {})
            settings = Settings(cfg=1.0, steps=steps, sampler=name, options=options)
            made.append(Cell(f"{name}-{budget}", settings, pictures))
    return tuple(made)


def report(protocol: Protocol, subject: Subject, folder: Path) -> None:
    """Print a line for each cell; write the curves."""
    found = cells.figures(protocol, subject, folder)
    print(f"kernel distance x 1000 [{protocol.space}] from {len(subject.reference)} real pictures, cfg 1\n")
    print("| sampler | steps | evaluations | kernel distance | pictures |\n| --- | --- | --- | --- | --- |")
    curves: dict[str, list[tuple[float, float]]] = {}
    for cell in protocol.cells:
        if cell.name not in found:
            continue
        row = found[cell.name]
        sampler, kernel = cell.settings.sampler, 1000 * row["kernel"]
        print(f"| {cell.name} | {cell.settings.steps} | {row['evaluations']:.0f} | {kernel:.1f} | {row['pictures']} |")
        curves.setdefault(sampler, []).append((row["evaluations"], kernel))
    with figure(folder / "samplers.png", "evaluations", f"kernel distance x 1000 [{protocol.space}]", (8, 6)) as axes:
        for index, (sampler, points) in enumerate(curves.items()):
            axes.plot(*zip(*sorted(points), strict=True), "osv^D"[index % 5] + "-", label=sampler, lw=1, ms=4)
        axes.axhline(found["autoencoder alone"]["kernel"] * 1000, color="gray", ls=":", label="autoencoder alone")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(ncols=2, fontsize=8)
    print(f"\nwrote figures.json and samplers.png into {folder}")
