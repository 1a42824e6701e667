"""The noise-level draw: where training puts its effort. Every draw is the inverse distribution of given uniforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import DiffusionLossConfig
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError


def uniform_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """Each trained level equally often (Ho et al. 2020, algorithm 1)."""
    return schedule.sigmas[(uniform * schedule.steps).long().clamp(max=schedule.steps - 1)]


def lognormal_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """ln sigma ~ N(level_mean, level_std^2) (Karras et al. 2022, table 1), clipped into the trained range."""
    normal = torch.special.ndtri(uniform)
    level = (config.level_mean + config.level_std * normal).exp()
    return level.clamp(schedule.sigma_min, schedule.sigma_max)


LEVELS: dict[str, Callable[[DiffusionLossConfig, Schedule, Tensor], Tensor]] = {
    "uniform": uniform_levels,
    "lognormal": lognormal_levels,
}


def draw_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """sigma (B,), float64 on the CPU, of `uniform` (B,) in [0, 1), which the caller draws with its own generator.

    Stratified or shared draws are the caller's choice of uniforms. Raises UserError for an unknown `config.levels`.
    """
    if config.levels not in LEVELS:
        raise UserError(f"loss.levels is '{config.levels}'; choose one of {', '.join(LEVELS)}")
    return LEVELS[config.levels](config, schedule, uniform.cpu().double())
