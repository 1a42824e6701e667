"""The reverse SDE of a noise law, by Euler's and Maruyama's method in the law's own time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.jobs.catalogue import check_levels
from ldm.sampling.ddpm import posterior
from ldm.sampling.step import Noise, Sampler, Step, leaps, level, trajectory

RESOLUTION = 1e-8
"""The part of the law's time over which its rates are taken."""


def euler_maruyama(schedule: Schedule) -> Sampler:
    """Euler-Maruyama on the reverse SDE of `schedule` in z = alpha x (Song et al. 2021, equation 6).

    The forward law dz = f z dt + g dW has f = d(log alpha)/dt and g^2 = alpha^2 d(sigma^2)/dt, so that
    z = alpha (x0 + sigma n). A step from time t down to t - d, with score_z = (D - x) / (alpha sigma^2), is

        z' = z - (f z - g^2 score_z) d + g sqrt(d) n.

    On a variance-preserving law f = -beta / 2 and g^2 = beta; on a variance-exploding one f = 0. The rates are those at
    the step's beginning, from the side that it steps to (a law of trained levels is geometric between them, and bends
    there). The method is of order 1 and, unlike the exponential ones, needs steps over which beta d stays well below 2.
    A law that ends in pure noise has an infinite f there, and the cosine law nearly so: the step out of it, and any
    leap (step.py), is DDPM's, with the posterior variance. The step to 0 gives D.

    When called, raises UserError for a grid that leaves the law's time.
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        check_grid(schedule, sigmas)

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            if sigma_next == 0:
                return x0, x0
            if leaps(sigma, sigma_next) or (schedule.pure_noise_end and sigma >= schedule.sigma_max * (1 - 1e-9)):
                keep, add = posterior(sigma, sigma_next)
                return x0 + (keep / sigma) * (x - x0) + add * noise(sigma, sigma_next).to(x), x0
            f, g2 = rates(schedule, sigma)
            d = _time(schedule, sigma) - _time(schedule, sigma_next)
            alpha = _alpha(schedule, sigma)
            z, score = alpha * x, (x0 - x) / (alpha * sigma**2)
            z = z - d * (f * z - g2 * score) + math.sqrt(g2 * d) * noise(sigma, sigma_next).to(x)
            return z / _alpha(schedule, sigma_next), x0

        return trajectory(x, sigmas, advance)

    return sample


def rates(schedule: Schedule, sigma: float) -> tuple[float, float]:
    """(f, g^2) = (d log alpha / dt, alpha^2 d sigma^2 / dt) at a level above the law's smallest, by a difference."""
    t, end = _time(schedule, sigma), _time(schedule, schedule.sigma_max)
    below = float(schedule.sigma(torch.tensor(t - RESOLUTION * end, dtype=torch.float64)))
    dt = t - _time(schedule, below)
    f = math.log(_alpha(schedule, sigma) / _alpha(schedule, below)) / dt
    return f, _alpha(schedule, sigma) ** 2 * (sigma - below) * (sigma + below) / dt


def check_grid(schedule: Schedule, sigmas: Tensor) -> None:
    """Raise UserError for a grid that leaves the law's time; a step to 0 is not looked at."""
    levels = [sigma for sigma in check_levels(map(float, sigmas)) if sigma > 0]
    first, last = levels[0], levels[-1]
    low, high = schedule.sigma_min * (1 - 1e-9), schedule.sigma_max * (1 + 1e-9)
    if len(levels) > 1 and (first > high or last < low):
        raise UserError(
            f"euler_maruyama walks from sigma {first:.4g} to {last:.4g}, but the noise law's time spans "
            f"{schedule.sigma_min:.4g} to {schedule.sigma_max:.4g}; choose a grid inside it"
        )


def _time(schedule: Schedule, sigma: float) -> float:
    return float(schedule.t(level(sigma)))


def _alpha(schedule: Schedule, sigma: float) -> float:
    return float(schedule.alpha(level(sigma)))
