"""Quality against cost: every sampler's distance from the real pictures, against evaluations of the network.

All on one grid, trailing, so that nothing else is varied; which grid is best for which is in docs/samplers.md.
"""

from __future__ import annotations

from ldm.files import atomic_write_bytes
from ldm.jobs import Settings
from ldm.jobs.catalogue import ADAPTIVE, SAMPLERS
from ldm.metrics.sweep import plot
from ldm.metrics.tables import sweep_table
from studies.subject import Subject

BUDGETS = (6, 12, 24, 48)  # evaluations, about
TWO: tuple[str, ...] = ("heun", "dpm_2", "dpm_2_a", "dpmpp_2s_a", "dpmpp_sde", "restart", "pc", "langevin")
COST: dict[str, int] = dict.fromkeys(TWO, 2)  # evaluations a step, where it is not 1
OPTIONS = {"langevin": {"moves": 2}}  # ten, its default, would leave a budget of 12 one level
TOLERANCES = (1e-1, 1e-2, 1e-3)  # of the adaptive ones, which take as many evaluations as that asks for


def run(subject: Subject, quick: bool, pictures: int) -> None:
    """Print a line for each sampler and cost, at cfg 1; write the curves."""
    names = ("ddim", "dpmpp_2m", "pc", "ode") if quick else tuple(SAMPLERS)
    cells = []
    for name in names:
        if name in ADAPTIVE:
            for tolerance in TOLERANCES[:1] if quick else TOLERANCES:
                options = {"rtol": tolerance, "atol": tolerance}
                settings = Settings(cfg=1.0, steps=2, sampler=name, spacing="karras", options=options)
                cells.append(subject.cell({"sampler": name, "of": f"tolerance {tolerance:g}"}, settings, pictures))
            continue
        for budget in BUDGETS[:1] if quick else BUDGETS:
            steps = budget // COST.get(name, 1)
            settings = Settings(1.0, steps, name, "trailing", options=OPTIONS.get(name, {}))
            cells.append(subject.cell({"sampler": name, "of": f"{steps} steps"}, settings, pictures))
    rows = subject.measure(cells)
    if not subject.crew.main:
        return
    print(sweep_table(rows, ("sampler", "of")))
    atomic_write_bytes(subject.folder / "samplers.png", plot(rows, ("sampler", "of")))
    print(f"\nwrote sweep.csv and samplers.png into {subject.folder}")
