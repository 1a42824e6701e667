"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) on any grid of levels.

Bayes' rule for x' at level r given x at level s and x0 (their equation 7, in x = x0 + sigma n):

    x' ~ N(x0 + (r / s)^2 (x - x0),  r^2 (1 - r^2 / s^2))
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.learned_variance import Fraction
from ldm.diffusion.schedule import PRESERVING, Schedule, step_deviations
from ldm.errors import UserError
from ldm.sampling.step import Noise, Renewal, Sampler, Step, level, trajectory, walk

VARIANCES = ("posterior", "beta", "learned")


def ddpm(variance: str = "posterior", schedule: Schedule | None = None, fraction: Fraction | None = None) -> Sampler:
    """`variance`: posterior (beta-tilde) or beta, the two of `step_deviations`, or learned, between them.

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
    renewal = posterior if variance == "posterior" else beta(schedule)
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, renewal)


def posterior(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Keep and add of the step whose noise has the deviation beta-tilde^(1/2)."""
    return sigma_next**2 / sigma, _deviations(None, sigma, sigma_next)[0]


def beta(schedule: Schedule | None = None) -> Renewal:
    """The posterior's mean with noise of deviation beta^(1/2); the step to 0 adds none, as in algorithm 2."""

    def renewal(sigma: float, sigma_next: float) -> tuple[float, float]:
        add = _deviations(schedule, sigma, sigma_next)[1] if sigma_next else 0.0
        return sigma_next**2 / sigma, add

    return renewal


def _deviations(schedule: Schedule | None, sigma: float, sigma_next: float) -> tuple[float, float]:
    alpha = PRESERVING.alpha if schedule is None else schedule.alpha
    low, high = step_deviations(alpha, level(sigma), level(sigma_next))
    return float(low), float(high)


def _learned(fraction: Fraction, schedule: Schedule | None) -> Sampler:
    """Each value's log variance is interpolated: ((1 + v) log beta + (1 - v) log beta-tilde) / 2."""

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            at = level(sigma)
            x0 = denoiser(x, at)
            if sigma_next == 0:
                return x0, x0
            low, high = _deviations(schedule, sigma, sigma_next)
            add = low * (high / low) ** ((1 + fraction(x, at).to(x)) / 2)
            return x0 + (sigma_next**2 / sigma**2) * (x - x0) + add * noise(sigma, sigma_next).to(x), x0

        return trajectory(x, sigmas, advance)

    return sample
