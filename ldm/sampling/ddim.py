"""DDIM (Song et al. 2021). In x = x0 + sigma n it is Euler's method on the probability flow, or Euler-ancestral.

Equation 12 with sigma_t of equation 16, divided by alpha at the next level (s = sigma, r = sigma_next):

    x' = x0 + sqrt(r^2 - add^2) (x - x0) / s + add n,        add = eta r sqrt(1 - r^2 / s^2)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.step import Noise, Sampler, Step, walk


def ddim(eta: float = 0.0) -> Sampler:
    """`eta` = 0 is deterministic; 1 has the variance of the chain's posterior, so the full grid is DDPM.

    Each step's added noise is at most sigma_next, which bounds eta by the grid's `largest_eta`. The step to sigma 0
    gives x0, whatever eta. Raises UserError for a negative or infinite eta, and when called with a grid that does not
    admit it.
    """
    if not 0 <= eta < math.inf:
        raise UserError(f"eta is {eta:g}; choose 0 (deterministic) or more, such as 1")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        largest = largest_eta(sigmas)
        if eta > largest * (1 + 1e-9):  # the caller may have rounded the largest one
            named = math.floor(largest * 1e4) / 1e4  # rounded down, so that what is named is admitted
            raise UserError(f"eta is {eta:g}, but this grid admits at most {named:.4f}; choose a smaller eta")
        return walk(denoiser, x, sigmas, noise, lambda s, r: ancestral(s, r, eta))

    return sample


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(keep, add) of the step above, with no more added than sigma_next: keep^2 + add^2 = sigma_next^2."""
    add = min(eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2), sigma_next)
    return math.sqrt(sigma_next**2 - add**2), add


def largest_eta(sigmas: Tensor) -> float:
    """The largest eta of a grid (N + 1,): the smallest 1 / sqrt(1 - (sigma_next / sigma)^2) of its steps.

    It is where no noise is left to keep, sigma_t = sqrt(1 - alpha_bar_prev). A step to 0 sets no bound, since nothing
    is added there.
    """
    ratio = (sigmas[1:] / sigmas[:-1])[sigmas[1:] > 0]
    return float((1 - ratio**2).rsqrt().min()) if len(ratio) else math.inf


def check_options(eta: float, s_noise: float) -> None:
    """Raise UserError unless both are 0 or more, and finite."""
    if not 0 <= eta < math.inf:
        raise UserError(f"eta is {eta:g}; choose 0 (deterministic) or more, such as 1")
    if not 0 <= s_noise < math.inf:
        raise UserError(
            f"s_noise is {s_noise:g}; choose 1 (the law's own noise), or another factor that is not below 0"
        )
