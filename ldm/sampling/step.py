"""What a sampler is, what it yields, and the two ends of a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Step:
    """One step from `sigma` to `sigma_next`: number `index` of `total`, counted from 0."""

    index: int
    total: int
    sigma: float
    sigma_next: float
    x: Tensor  # (B, C, h, w): the state after the step, x0 + sigma_next n
    x0: Tensor  # (B, C, h, w): the denoiser's prediction in it


Noise = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> unit normals (B, C, h, w) for the step between them."""

Sampler = Callable[[Denoiser, Tensor, Tensor, Noise], Iterator[Step]]
"""(denoiser, x (B, C, h, w), sigmas (N + 1,), noise) -> N steps. Nothing that is passed in is changed."""

Law = Callable[[float, float], tuple[float, float]]
"""(sigma, sigma_next) -> (keep, add): deviations of the noise kept from x and of the noise added."""


def start(noise: Tensor, schedule: Schedule, sigmas: Tensor) -> Tensor:
    """The state at the grid's first level: the chain's z is pure unit `noise` (B, C, h, w) there, and x = z / alpha."""
    return solver_state(noise) / float(schedule.alpha(sigmas[0]))


def finish(x: Tensor, schedule: Schedule, sigmas: Tensor) -> Tensor:
    """The latent (B, C, h, w), float32, of the last state: z = alpha x at the grid's last level, x itself at 0."""
    return (x * float(schedule.alpha(sigmas[-1]))).to(torch.float32)


def solver_state(x: Tensor) -> Tensor:
    """`x` as samplers carry it: float64, or float32 on a device that has no more (mps)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def walk(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, law: Law) -> Iterator[Step]:
    """Every sampler of one evaluation a step: x <- x0 + keep (x - x0) / sigma + add n, with keep and add from `law`.

    (x - x0) / sigma is the noise that the denoiser sees in x. Noise is asked for only where some is added.
    """
    x = solver_state(x)
    for index in range(len(sigmas) - 1):
        sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
        x0 = denoiser(x, sigmas[index])
        keep, add = law(sigma, sigma_next)
        x = x0 + (keep / sigma) * (x - x0)
        if add > 0:
            x = x + add * noise(sigma, sigma_next).to(x)
        yield Step(index, len(sigmas) - 1, sigma, sigma_next, x, x0)
