"""Fidelity against diversity: precision and recall over the guidance scale (Ho & Salimans 2022, figure 4)."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.image_io import grid, save_png
from ldm.jobs import Settings
from ldm.metrics.distances import precision_recall
from studies import cells
from studies.cells import SHOWN, Cell, Protocol
from studies.plot import figure
from studies.subject import Subject

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def make_cells(quick: bool, pictures: int) -> tuple[Cell, ...]:
    scales = (1.0, 3.0) if quick else SCALES
    steps = 6 if quick else 20
    return tuple(
        Cell(f"cfg{scale:g}", Settings(cfg=scale, steps=steps, sampler="dpmpp_2m"), pictures) for scale in scales
    )


def report(protocol: Protocol, subject: Subject, folder: Path) -> None:
    """Print a line for each scale; write the curve and the pictures."""
    found = cells.figures(protocol, subject, folder)
    print(f"[{protocol.space}] against {len(subject.reference)} real pictures, precision and recall of 3 neighbours\n")
    print("| cfg | kernel distance x 1000 | precision | recall | pictures |\n| --- | --- | --- | --- | --- |")
    points, rows = [], []
    for cell, drawn in cells.collect(protocol, folder):
        precision, recall = precision_recall(drawn.features, subject.reference)
        kernel, pictures = 1000 * found[cell.name]["kernel"], found[cell.name]["pictures"]
        print(f"| {cell.settings.cfg:g} | {kernel:.1f} | {precision:.3f} | {recall:.3f} | {pictures} |")
        points.append((recall, precision, cell.settings.cfg))
        rows.append(drawn.images)
    with figure(folder / "guidance.png", "recall (diversity)", "precision (fidelity)") as axes:
        axes.plot([r for r, _, _ in points], [p for _, p, _ in points], "o-")
        for recall, precision, scale in points:
            axes.annotate(f"cfg {scale:g}", (recall, precision), textcoords="offset points", xytext=(6, 4))
    if rows:
        save_png(grid(torch.cat(rows), columns=SHOWN), folder / "guidance-grid.png", {})
    print(f"\nwrote figures.json, guidance.png and guidance-grid.png (a row for each scale) into {folder}")
