"""What a sampler is, what it yields, and the two ends of a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.jobs.catalogue import check_levels


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

Renewal = Callable[[float, float], tuple[float, float]]
"""(sigma, sigma_next) -> (keep, add): deviations of the noise kept from x and of the noise added."""

LEAP = 30.0
"""A step that divides sigma by more is a leap: the first one of a law that ends in pure noise spans a factor of
hundreds or thousands. No step of EDM's own grid (80 to 0.002, rho 7) of 7 or more is one. Methods that are good for
small steps alone, and would carry what is wrong after a leap to the end, take another step there, and say which."""

Advance = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
"""(x at sigma, sigma, sigma_next) -> (x at sigma_next, x0): one step, the denoiser and any memory closed over."""


def start(noise: Tensor, schedule: Schedule, sigmas: Tensor) -> Tensor:
    """The state at the grid's first level, nothing but unit `noise` (B, C, h, w) times the schedule's `start_scale`."""
    return solver_state(noise) * float(schedule.start_scale(sigmas[0]))


def finish(x: Tensor, schedule: Schedule, sigmas: Tensor) -> Tensor:
    """The latent (B, C, h, w), float32, of the last state: z = alpha x at the grid's last level, x itself at 0."""
    return (x * float(schedule.alpha(sigmas[-1]))).to(torch.float32)


def solver_state(x: Tensor, device: torch.device | None = None) -> Tensor:
    """`x` as samplers carry it, on its own device or another: float64, or float32 where there is no more (mps)."""
    device = device or x.device
    return x.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def flow(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Along the probability flow dx / dsigma = (x - x0) / sigma from `sigma` to `sigma_next`, were x0 constant.

    One step of Euler's method is this with the denoiser's x0; the methods of higher order are this with an average of
    several, and differ in nothing else. No term grows with sigma, and sigma_next = 0 gives `x0` exactly.
    """
    return x0 + (sigma_next / sigma) * (x - x0)


def trajectory(x: Tensor, sigmas: Tensor, advance: Advance) -> Iterator[Step]:
    """Every sampler's loop: `advance` over each interval of the grid, from `x` (B, C, h, w) at its first level.

    Raises UserError for an invalid grid.
    """
    levels = check_levels(map(float, sigmas))
    x = solver_state(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x, x0 = advance(x, sigma, sigma_next)
        yield Step(index, len(levels) - 1, sigma, sigma_next, x, x0)


def leaps(sigma: float, sigma_next: float) -> bool:
    """Whether the step from `sigma` to `sigma_next` > 0 is a leap."""
    return sigma > LEAP * sigma_next


def level(sigma: float) -> Tensor:
    """`sigma` as a denoiser takes it: (), float64, on the CPU like the grid."""
    return torch.tensor(sigma, dtype=torch.float64)


def walk(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, renewal: Renewal, seeing: Denoiser | None = None
) -> Iterator[Step]:
    """Every sampler of one evaluation a step and no memory: x <- x0 + keep (x - x0) / sigma + add n, by `renewal`.

    (x - x0) / sigma is the noise that the denoiser sees in x, or, where it is given, the denoiser `seeing`. Noise is
    asked for only where some is added.
    """

    def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
        at = level(sigma)
        x0 = denoiser(x, at)
        keep, add = renewal(sigma, sigma_next)
        x = x0 + (keep / sigma) * (x - (x0 if seeing is None else seeing(x, at)))
        return (x + add * noise(sigma, sigma_next).to(x) if add > 0 else x), x0

    return trajectory(x, sigmas, advance)
