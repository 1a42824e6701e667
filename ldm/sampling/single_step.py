"""DPM-Solver of order 3, one step at a time ("DPM fast"; Lu et al. 2022, algorithm 2 and section 3.4).

A step of order p takes p evaluations, at its beginning and at levels on the way that the ones before reach. Here
those levels are the grid's own: three intervals of the grid are one step of order 3. On a grid even in log sigma
(logsnr) they lie at a third and two thirds of the step, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.sampling.adams import integrals
from ldm.sampling.step import Noise, Sampler, Step, leaps, level, trajectory


def orders(count: int) -> list[int]:
    """Of the steps that `count` evaluations make: 3, 3, .. and a last one of 1 or 2; or 2, 1, where 3 would divide it.

    The paper's DPM-Solver-fast: the last step is of low order, where a high one would be least steady.
    """
    whole, rest = divmod(count, 3)
    return [3] * whole + [rest] if rest else [3] * (whole - 1) + [2, 1] if whole else []


def places(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Of each interval of a grid: its place in its step, from 0, and the step's order.

    A leap (step.py) and the step to 0 are steps by themselves.
    """
    found: list[tuple[int, int]] = []
    between = 0
    for index, pair in enumerate(pairwise(levels)):
        alone = leaps(*pair)
        between += not alone
        if alone or index == len(levels) - 2:
            found += [(place, order) for order in orders(between) for place in range(order)] + [(0, 1)] * alone
            between = 0
    return found


def dpm_fast() -> Sampler:
    """N evaluations in N steps: the states on the way are of order 1 and 2, each third one of order 3.

    eps = (x - D) / sigma is continued linearly in log sigma, from the step's first level through the last one that was
    reached. The step to 0 is Euler's.
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        stages = iter(places(sigmas.tolist()))
        begin, first, at = x, x, 0.0  # of the step under way: its state, eps there, and its level

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            nonlocal begin, first, at
            place, order = next(stages)
            x0 = denoiser(x, level(sigma))
            eps = (x - x0) / sigma
            if place == 0:
                begin, first, at = x, eps, sigma
            if sigma_next == 0:
                return x0, x0
            ahead = begin + (sigma_next - at) * first
            if place > 0 and order == 2:  # the midpoint rule
                ahead = ahead + (sigma_next - at) * (eps - first)
            elif place > 0:
                weight = integrals([math.log(at), math.log(sigma)], math.log(sigma_next), np.exp)[1]
                ahead = ahead + weight * (eps - first)
            return ahead, x0

        return trajectory(x, sigmas, advance)

    return sample
