"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) on any grid of levels.

Bayes' rule for x' at level r given x at level s and x0 (their equation 7, in x = x0 + sigma n):

    x' ~ N(x0 + (r / s)^2 (x - x0),  r^2 (1 - r^2 / s^2))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.sampling.step import Law, Noise, Sampler, Step, level, trajectory, walk

VARIANCES = ("posterior", "beta", "learned")

Fraction = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma ()) -> v (B, C, h, w): -1 means the posterior variance, 1 beta, geometric between."""


def ddpm(variance: str = "posterior", schedule: Schedule | None = None, fraction: Fraction | None = None) -> Sampler:
    """`variance`: posterior (beta-tilde) or beta, the two of Ho et al. 2020, section 3.2, or learned, between them.

    `schedule` is the law whose beta is meant, the variance-preserving one if left out. `fraction` belongs to learned
    (Nichol & Dhariwal 2021, equation 15): it is asked at each step, after the denoiser and with the very same tensors,
    so it may read what that evaluation left behind. Raises UserError for another variance, and for learned without it.
    """
    if variance not in VARIANCES:
        raise UserError(f"the variance of ddpm is '{variance}'; choose one of {', '.join(VARIANCES)}")
    if variance == "learned":
        if fraction is None:
            raise UserError("the variance of ddpm is 'learned', but this model predicts none; choose posterior or beta")
        return _learned(fraction, schedule)
    law = posterior if variance == "posterior" else beta_law(schedule)
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, law)


def posterior(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The posterior's own variance: right if the data were a single point (beta-tilde)."""
    return sigma_next**2 / sigma, sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


def beta_law(schedule: Schedule | None = None) -> Law:
    """The posterior's mean with the variance of the forward step from r to s, z_s = (a_s / a_r) z_r + noise.

    In z = a x that noise has variance a_s^2 (s^2 - r^2), so in x', which is z_r / a_r,

        add^2 = (s^2 - r^2) (a_s / a_r)^2.

    On the variance-preserving law it is beta = 1 - alpha_bar_s / alpha_bar_r over alpha_bar_r, right if the data were
    N(0, I) already. The step to 0 adds none, as in algorithm 2.
    """

    def alpha(sigma: float) -> float:
        return 1 / math.hypot(1, sigma) if schedule is None else float(schedule.alpha(level(sigma)))

    def law(sigma: float, sigma_next: float) -> tuple[float, float]:
        keep, _ = posterior(sigma, sigma_next)
        if sigma_next == 0:
            return keep, 0.0
        return keep, math.sqrt(sigma**2 - sigma_next**2) * alpha(sigma) / alpha(sigma_next)

    return law


def _learned(fraction: Fraction, schedule: Schedule | None) -> Sampler:
    """Each value's log variance is interpolated: ((1 + v) log beta + (1 - v) log beta-tilde) / 2."""
    largest = beta_law(schedule)

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            at = level(sigma)
            x0 = denoiser(x, at)
            if sigma_next == 0:
                return x0, x0
            keep, low = posterior(sigma, sigma_next)
            _, high = largest(sigma, sigma_next)
            add = low * (high / low) ** ((1 + fraction(x, at).to(x)) / 2)
            return x0 + (keep / sigma) * (x - x0) + add * noise(sigma, sigma_next).to(x), x0

        return trajectory(x, sigmas, advance)

    return sample
