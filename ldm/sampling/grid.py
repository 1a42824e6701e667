"""The grid: the decreasing levels that a sampler walks. N steps asked are N steps run.

The three spacings are those of Lin et al. 2024, table 2, on the trained levels t = 0 .. T - 1:

    trailing   t = round(T - i T / N) - 1, then sigma = 0. Starts at the last level: right for few steps.
    linspace   N levels evenly from T - 1 to 0, then sigma = 0 (a single step starts at T - 1).
    leading    t = i (T // N) + 1 for i = N - 1 .. 0, then the smallest trained level, t = 0, not sigma = 0. This is the
               original DDIM's grid, as Stable Diffusion was released with it (the offset of 1 and "set_alpha_to_one"
               false): it starts short of the last level by about T / N, so it needs many steps. N = T leaves no room
               for the offset and is the full chain, which ends at 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) from the last trained level to 0, evenly from the end."""
    spans = torch.arange(steps, dtype=torch.float64) * (schedule.steps / steps)
    return _levels(schedule, (schedule.steps - spans).round() - 1, end=0.0)


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) over all trained levels, both ends included, then 0."""
    return _levels(schedule, torch.linspace(schedule.steps - 1, 0, steps, dtype=torch.float64).round(), end=0.0)


def leading(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly from the beginning, down to the schedule's smallest level."""
    if steps == schedule.steps:
        return trailing(schedule, steps)
    times = torch.arange(steps - 1, -1, -1) * (schedule.steps // steps) + 1
    return _levels(schedule, times, end=schedule.sigma_min)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


def make_grid(schedule: Schedule, steps: int, spacing: str = "trailing") -> Tensor:
    """(steps + 1,) float64 on the CPU, strictly decreasing. UserError for steps outside [1, T] or another spacing."""
    if spacing not in GRIDS:
        raise UserError(f"the grid is '{spacing}'; choose one of {', '.join(GRIDS)}")
    if not 1 <= steps <= schedule.steps:
        raise UserError(f"{steps} steps were asked for; choose between 1 and {schedule.steps}, the trained levels")
    return GRIDS[spacing](schedule, steps)


def _levels(schedule: Schedule, times: Tensor, end: float) -> Tensor:
    return torch.cat([schedule.sigmas[times.long()], torch.tensor([end], dtype=torch.float64)])
