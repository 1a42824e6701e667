"""Fidelity against diversity: precision and recall over the guidance scale (Ho & Salimans 2022, figure 4)."""

from __future__ import annotations

from ldm.files import atomic_write_bytes
from ldm.jobs import Settings
from ldm.metrics.sweep import plot
from ldm.metrics.tables import sweep_table
from studies.subject import Subject

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


def run(subject: Subject, quick: bool, pictures: int) -> None:
    """Print a line for each scale; write the curve and the pictures."""
    steps = 6 if quick else 20
    cells = [
        subject.cell({"cfg": scale}, Settings(cfg=scale, steps=steps, sampler="dpmpp_2m", spacing="trailing"), pictures)
        for scale in (SCALES[::3] if quick else SCALES)
    ]
    rows = subject.measure(cells)
    if not subject.crew.main:
        return
    print(sweep_table(rows, ["cfg"]))
    atomic_write_bytes(subject.folder / "guidance.png", plot(rows, ["cfg"]))
    subject.save_grid(cells, "guidance-grid.png")
    print(f"\nwrote sweep.csv, guidance.png and guidance-grid.png (a row for each scale) into {subject.folder}")
