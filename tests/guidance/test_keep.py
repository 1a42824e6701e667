"""Inpainting on a Gaussian: what is known stays, and each sampler leads there exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.guidance import keep
from ldm.sampling import SAMPLERS, NoiseStream, make_grid, start

SCHEDULE = make_schedule(ScheduleConfig())
LATENT = torch.linspace(-2, 2, 32, dtype=torch.float64).reshape(1, 2, 4, 4)
MASK = torch.zeros(1, 1, 4, 4)
MASK[..., :2] = 1


def standard_normal(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for x0 ~ N(0, I)."""
    return x / (1 + float(sigma) ** 2)


def drawn(denoiser: object, sampler: str) -> Tensor:
    sigmas, noise = make_grid(SCHEDULE, 10, "trailing"), NoiseStream([3], (2, 4, 4))
    *_, last = SAMPLERS[sampler]()(denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise)  # type: ignore[arg-type]
    return last.x


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "dpmpp_2m", "unipc", "lcm"])
def test_the_known_half_is_kept_and_the_other_is_drawn_as_without(sampler: str) -> None:
    """Pixels of this law do not depend on each other, so the drawn half is what the sampler draws alone."""
    inside = MASK.bool().expand_as(LATENT)
    kept, free = drawn(keep(standard_normal, LATENT, MASK), sampler), drawn(standard_normal, sampler)
    torch.testing.assert_close(kept[~inside], LATENT[~inside], rtol=0, atol=1e-12)
    torch.testing.assert_close(kept[inside], free[inside], rtol=0, atol=1e-12)
    assert (free - LATENT)[~inside].abs().max() > 0.5
