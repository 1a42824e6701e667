"""The noise-level draw: where training puts its effort. Every draw is the inverse distribution of given uniforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.model_config import DiffusionLossConfig


def uniform_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """Each of a chain's levels equally often (Ho et al. 2020, algorithm 1); in continuous time, uniform in t."""
    if schedule.is_chain:
        return schedule.sigmas[(uniform * schedule.steps).long().clamp(max=schedule.steps - 1)]
    return schedule.sigma(schedule.t_min + uniform * (schedule.t_max - schedule.t_min))


def lognormal_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """ln sigma ~ N(-1.2, 1.2^2) unless told otherwise (Karras et al. 2022, table 1), clipped into the trained range."""
    return _normal_in_log(config, schedule, uniform, mean=-1.2, std=1.2)


def logit_normal_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """logit t ~ N(0, 1) of rectified flow's t in (0, 1) unless told otherwise (Esser et al. 2024, equation 19).

    logit t = ln(t / (1 - t)) = ln sigma, so this is the log-normal draw with another mean and deviation.
    """
    return _normal_in_log(config, schedule, uniform, mean=0.0, std=1.0)


def _normal_in_log(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor, mean: float, std: float) -> Tensor:
    mean = mean if config.level_mean is None else config.level_mean
    std = std if config.level_std is None else config.level_std
    level = (mean + std * torch.special.ndtri(uniform)).exp()
    return level.clamp(schedule.sigma_min, schedule.sigma_max)


LEVELS: dict[str, Callable[[DiffusionLossConfig, Schedule, Tensor], Tensor]] = {
    "uniform": uniform_levels,
    "lognormal": lognormal_levels,
    "logit_normal": logit_normal_levels,
}


def draw_levels(config: DiffusionLossConfig, schedule: Schedule, uniform: Tensor) -> Tensor:
    """sigma (B,), float64 on the CPU, of `uniform` (B,) in [0, 1) there, which the caller draws with a generator.

    With `config.lowest` they are of the lowest share of the levels alone, as a refiner's (Podell et al. 2023, 2.5). A
    flow's shift moves them, whatever their law. Stratified draws are the caller's choice of uniforms
    (training/draws.py). Raises UserError for an unknown `config.levels`.
    """
    if config.levels not in LEVELS:
        raise UserError(f"loss.levels is '{config.levels}'; choose one of {', '.join(LEVELS)}")
    if config.lowest < 1 and config.levels != "uniform":
        raise UserError(
            f"loss.lowest is a share of levels drawn uniformly, and loss.levels is {config.levels}; set one"
        )
    uniform = uniform * config.lowest
    return schedule.shifted(LEVELS[config.levels](config, schedule, uniform.cpu().double()))
