"""On a Brownian path more steps refine the same picture: each trajectory converges by itself, not in law alone.

The root mean square over 500 points of a mixture between the ends of N and 2 N steps, both from 14.6 to 0.03. With
additive noise the theory says order 1 for all, however well a sampler follows D, since what the noise does within a
step is not seen.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.sampling import (
    BrownianPath,
    Noise,
    NoiseStream,
    Sampler,
    ddim,
    ddpm,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler_a,
    euler_maruyama,
)

from .affine import geometric, slopes
from .closed_forms import three_clusters

COUNT = 500
DATA = three_clusters()
SAMPLERS = {
    "ddpm": ddpm(),
    "ddpm beta": ddpm("beta"),
    "ddim eta 0.5": ddim(0.5),
    "euler_a": euler_a(),
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "dpmpp_3m_sde": dpmpp_3m_sde(),
    "dpmpp_sde": dpmpp_sde(),
    "euler_maruyama": euler_maruyama(make_schedule(ScheduleConfig())),
}


@cache
def on_path(sigma: float, sigma_next: float) -> Tensor:
    """The points are one picture of shape (COUNT, 1, 2), so that one path serves them all."""
    return path()(sigma, sigma_next).reshape(COUNT, 1, 1, 2)


@cache
def path() -> BrownianPath:
    return BrownianPath([3], (COUNT, 1, 2), dtype=torch.float64)


def end(sampler: Sampler, steps: int, noise: Noise) -> Tensor:
    x = 14.6 * path().initial().reshape(COUNT, 1, 1, 2)
    for step in sampler(DATA.denoiser, x, geometric(14.6, 0.03, steps), noise):
        last = step.x
    return last


def changes(sampler: Sampler, counts: tuple[int, ...], kind: str) -> list[float]:
    """Between the ends of each two numbers of steps."""
    ends = []
    for steps in counts:
        stream = NoiseStream([3], (COUNT, 1, 2))
        fresh: Noise = lambda s, r, stream=stream: stream(s, r).reshape(COUNT, 1, 1, 2)  # noqa: E731
        ends.append(end(sampler, steps, on_path if kind == "path" else fresh))
    return [float((coarse - fine).square().mean().sqrt()) for coarse, fine in pairwise(ends)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_more_steps_refine_the_same_trajectories(name: str) -> None:
    """The mean slope over three halvings is 0.8 or more (1 in the limit)."""
    found = changes(SAMPLERS[name], (16, 32, 64, 128, 256), "path")
    assert sum(slopes(found)) / 3 >= 0.8, (found, slopes(found))
    assert found[-1] < 0.05


def test_a_stream_does_not_refine() -> None:
    """The same seed with other noise in each step: a different picture for each number of steps."""
    found = changes(dpmpp_2m_sde(), (16, 32, 64, 128), "stream")
    assert min(found) > 0.8, found
