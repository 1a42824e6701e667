"""A grid by name, written out, or weakened: the decreasing levels that a sampler walks. spacings.py has them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.jobs.catalogue import check_levels
from ldm.ranges import WEAKEST
from ldm.sampling.spacings import GRIDS, TRAINED_GRIDS


def make_grid(schedule: Schedule, steps: int, spacing: str = "trailing", rho: float | None = None) -> Tensor:
    """(steps + 1,) float64 on the CPU, strictly decreasing, from the schedule's last level (leading: from below it).

    `rho`: of the spacings that have one. Raises UserError for an unknown spacing, for steps < 1, and for more steps
    than trained levels where it walks those.
    """
    if spacing not in GRIDS:
        raise UserError(f"the grid is '{spacing}'; choose one of {', '.join(GRIDS)}")
    if spacing in TRAINED_GRIDS and not 1 <= steps <= schedule.steps:
        raise UserError(f"{steps} steps were asked for; choose between 1 and {schedule.steps}, the trained levels")
    if steps < 1:
        raise UserError(f"{steps} steps were asked for; choose at least 1")
    return GRIDS[spacing](schedule, steps, **({} if rho is None else {"rho": rho}))


def listed(schedule: Schedule, sigmas: Sequence[float]) -> Tensor:
    """(len(sigmas),) the grid of levels written out: N + 1 of them for N steps, strictly decreasing, 0 or more.

    Raises UserError for anything else, and for a first level beyond the schedule's last, which no model knows.
    """
    levels = torch.tensor(check_levels(sigmas), dtype=torch.float64)
    if levels[0] > schedule.sigma_max * (1 + 1e-6):  # a written number is rounded
        raise UserError(
            f"the grid of sigmas begins at {float(levels[0]):g}, but the model's noise schedule ends at "
            f"{schedule.sigma_max:g}; begin there or below"
        )
    return levels


def weakened(schedule: Schedule, sigmas: Tensor, strength: float) -> Tensor:
    """(N + 1,) as many steps from a lower level: where a given picture, noised to the first level, is taken up.

    Each level's time is brought nearer to the schedule's first, t <- t_min + strength (t - t_min), so the level that a
    strength means depends neither on the number of steps nor on the spacing, and lies between trained levels where need
    be. Strength 1 is the grid itself; strength 0 the level 0 alone, from which there is no step to take; what is below
    the schedule's levels stays. Raises UserError for a strength outside [0, 1], and for one so small that its levels
    could not be told apart.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the strength is {strength:g}; choose it from 0 (as it is) to 1 (drawn anew)")
    if strength == 0:
        return torch.zeros(1, dtype=torch.float64)
    if strength == 1:
        return sigmas.clone()
    if strength < WEAKEST:
        raise UserError(f"the strength is {strength:g}, which changes nothing; choose 0, or {WEAKEST} to 1")
    lower = schedule.sigma(schedule.t_min + strength * (schedule.t(sigmas) - schedule.t_min))
    return torch.where(sigmas > schedule.sigma_min, lower, sigmas)
