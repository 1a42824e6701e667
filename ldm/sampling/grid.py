"""The grid: the decreasing levels that a sampler walks. N steps asked are N steps run.

Three spacings are those of Lin et al. 2024, table 2, on the trained levels t = 0 .. T - 1, so N is at most T:

    trailing     t = round(T - i T / N) - 1, then sigma = 0. Starts at the last level: right for few steps.
    linspace     N levels evenly from T - 1 to 0, then sigma = 0 (a single step starts at T - 1).
    leading      t = i (T // N) + 1 for i = N - 1 .. 0, then the smallest trained level, t = 0, not sigma = 0. This is
                 the original DDIM's grid, as Stable Diffusion was released with it (the offset of 1 and
                 "set_alpha_to_one" false): it starts short of the last level by about T / N, so it needs many steps.
                 N = T leaves no room for the offset and is the full chain, which ends at 0.

Three are formulas in sigma between the law's ends, for any N:

    karras       N levels, even in sigma^(1/7), then sigma = 0 (Karras et al. 2022, equation 5).
    exponential  N levels, even in log sigma, then sigma = 0: a last step removes what noise is left at sigma_min.
    logsnr       N + 1 levels, even in log SNR = -2 log sigma, and no 0: as in DPM-Solver (Lu et al. 2022).
                 The spacing is that of `exponential`; what differs is that it ends at sigma_min, so every step is of
                 one length and none is left to the first order.

The last is even in t too, and falls between trained levels:

    uniform      N levels evenly from t of the last trained level to t of the first, then sigma = 0.

A model of rectified flow may have a shift (Esser et al. 2024), which moves all levels of the grids in t and none of
the formulas in sigma. The last level of `uniform` is moved twice, as the trained end is taken with its shift: Stable
Diffusion 3 is drawn so.

Between the levels at which anything is to be seen, that is. A law that begins beyond `HIGHEST` (zero terminal SNR, a
flow, the cosine law) would have these three spend most of their steps in pure noise, where nothing happens. They are
spaced from `HIGHEST` down, and their first level alone is then moved up to where the law begins.

`listed` checks levels written out, and `weakened` brings a grid down to where a given picture is taken up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.jobs.catalogue import check_levels
from ldm.ranges import WEAKEST

RHO = 7.0
"""Karras et al. 2022, appendix D.1: 3 makes the errors of all steps even, 5 to 10 makes better pictures."""

HIGHEST = 160.0
"""The SNR of unit-variance data is 4e-5 there. Just above the continuous variance-preserving law's end, 152."""


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) from the last trained level to 0, evenly from the end."""
    spans = torch.arange(steps, dtype=torch.float64) * (schedule.steps / steps)
    return _to_zero(_trained(schedule, (schedule.steps - spans).round() - 1))


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) over all trained levels, both ends included, then 0."""
    return _to_zero(_trained(schedule, torch.linspace(schedule.steps - 1, 0, steps, dtype=torch.float64).round()))


def leading(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly from the beginning, down to the schedule's smallest level."""
    if steps == schedule.steps:
        return trailing(schedule, steps)
    times = torch.arange(steps - 1, -1, -1) * (schedule.steps // steps) + 1
    return torch.cat([_trained(schedule, times), _trained(schedule, torch.zeros(1))])


def karras(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in sigma^(1 / rho) from sigma_max to sigma_min, then 0."""
    return _to_zero(_between(schedule, steps, lambda sigma: sigma ** (1 / RHO), lambda root: root**RHO))


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in log sigma from sigma_max to sigma_min, then 0."""
    return _to_zero(_between(schedule, steps, math.log, torch.exp))


def logsnr(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in log sigma from sigma_max to sigma_min, where it ends."""
    return _between(schedule, steps + 1, math.log, torch.exp)


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in t from the last trained level to the first with its shift, all of that shifted; then 0."""
    first = float(schedule.t(schedule.shifted(schedule.sigmas[0])))
    times = torch.linspace(schedule.t_max, first, steps, dtype=torch.float64)
    return _to_zero(schedule.shifted(schedule.sigma(times)))


Grid = Callable[[Schedule, int], Tensor]

TRAINED_GRIDS: dict[str, Grid] = {"leading": leading, "trailing": trailing, "linspace": linspace}
GRIDS: dict[str, Grid] = {
    **TRAINED_GRIDS,
    "karras": karras,
    "exponential": exponential,
    "logsnr": logsnr,
    "uniform": uniform,
}


def make_grid(schedule: Schedule, steps: int, spacing: str = "trailing") -> Tensor:
    """(steps + 1,) float64 on the CPU, strictly decreasing, from the schedule's last level (leading: from below it).

    Raises UserError for an unknown spacing, for steps < 1, and for more steps than trained levels where it walks those.
    """
    if spacing not in GRIDS:
        raise UserError(f"the grid is '{spacing}'; choose one of {', '.join(GRIDS)}")
    if spacing in TRAINED_GRIDS and not 1 <= steps <= schedule.steps:
        raise UserError(f"{steps} steps were asked for; choose between 1 and {schedule.steps}, the trained levels")
    if steps < 1:
        raise UserError(f"{steps} steps were asked for; choose at least 1")
    return GRIDS[spacing](schedule, steps)


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


def _trained(schedule: Schedule, times: Tensor) -> Tensor:
    return schedule.shifted(schedule.sigmas[times.long()])


def _to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def _between(
    schedule: Schedule, count: int, forth: Callable[[float], float], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """`count` levels evenly spaced in `forth` of sigma, from the schedule's sigma_max to its sigma_min, both exact."""
    high, low = min(schedule.sigma_max, HIGHEST), schedule.sigma_min
    sigmas = back(torch.linspace(forth(high), forth(low), count, dtype=torch.float64))
    sigmas[-1] = low
    sigmas[0] = schedule.sigma_max
    return sigmas
