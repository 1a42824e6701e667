"""Denoiser -> latent. A sampler is a generator of `Step`s that knows no prompt, guidance or parameterization.

sigmas = make_grid(schedule, 30, "trailing")
noise = NoiseStream([seed, seed + 1], (C, h, w))
x = start(noise.initial(), schedule, sigmas)
for step in ddim()(denoiser, x, sigmas, noise):
    x = step.x
latent = finish(x, schedule, sigmas)
"""

from collections.abc import Callable

from ldm.sampling.ddim import ddim
from ldm.sampling.ddpm import ddpm
from ldm.sampling.grid import GRIDS, make_grid
from ldm.sampling.noise import NoiseStream
from ldm.sampling.step import Noise, Sampler, Step, finish, start

SAMPLERS: dict[str, Callable[..., Sampler]] = {"ddim": ddim, "ddpm": ddpm}
"""Each name's factory; what it takes (eta, variance) is in its docstring."""

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "Noise",
    "NoiseStream",
    "Sampler",
    "Step",
    "ddim",
    "ddpm",
    "finish",
    "make_grid",
    "start",
]
