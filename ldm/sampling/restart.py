"""Restart (Xu et al. 2023, algorithm 1): Heun's method, with stretches of the grid that are walked again from noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.one_step import heuns_step
from ldm.sampling.step import Noise, Sampler, Step, trajectory


def restart(times: int = 1, low: float = 0.1, high: float = 2.0) -> Sampler:
    """Where the grid arrives at its last level of `low` or more, `times` times noise up to its first level of `high` or
    less is added, and the levels between are walked again.

    Fresh noise at a level is what contracts the errors made above it, and the flow below adds few of its own. Heun's
    step throughout; 2 N - 1 evaluations on a grid of N steps that ends at 0, and two more for each interval of each
    restart. What a restart walks belongs to the step that arrived. Nothing is restarted where the grid has not two
    levels there. Raises UserError for negative times, and for low and high that are not 0 < low < high.
    """
    if times < 0:
        raise UserError(f"restart was given {times} times; choose 0 or more")
    if not 0 < low < high:
        raise UserError(f"restart goes from {low:g} up to {high:g}; choose 0 < low < high")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        stretch = [each for each in map(float, sigmas) if low <= each <= high]

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x, x0 = heuns_step(denoiser, x, sigma, sigma_next)
            for _ in range(times if len(stretch) > 1 and sigma_next == stretch[-1] else 0):
                x = x + math.sqrt(stretch[0] ** 2 - stretch[-1] ** 2) * noise(stretch[0], stretch[-1]).to(x)
                for begin, end in pairwise(stretch):
                    x, x0 = heuns_step(denoiser, x, begin, end)
            return x, x0

        return trajectory(x, sigmas, advance)

    return sample
