"""Ancestral samplers ("Euler a"): a step of the probability flow to below the next level, then noise up to it.

The step ends at sqrt(sigma_next^2 - add^2), and a normal of deviation `s_noise` add follows, with add as in ddim.py,
but never more than sigma_next. With eta = 0 each is its method without noise; 1 draws as much anew as DDPM. `s_noise`
other than 1 leaves the law on purpose (more texture, or less). All raise UserError for a negative option.
"""

from __future__ import annotations

from ldm.sampling.ddim import ancestral, check_options
from ldm.sampling.one_step import by_midpoint, steep
from ldm.sampling.step import Renewal, Sampler, walk


def euler_a(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Euler's step. With x + (down - sigma) (x - D) / sigma = D + (down / sigma) (x - D) this is DDIM, step for step
    and for the same eta: eta = 1 is DDPM with the posterior variance, 0 Euler. Where DDIM refuses an eta that would
    add more noise than the next level holds, a large eta draws all of it anew here.
    """
    renewal = renewed(eta, s_noise)
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, renewal)


def dpm_2_a(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """DPM-Solver-2's step ("DPM2 a"), as in k-diffusion: two evaluations, one in the step to 0."""
    return by_midpoint(renewed(eta, s_noise), steep)


def dpmpp_2s_a(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """DPM-Solver++ (2S)'s step ("DPM++ 2S a"), as in k-diffusion: two evaluations, one in the step to 0.

    D at the middle, in log sigma, stands for the whole step. `dpmpp_sde` adds noise at the middle too.
    """
    return by_midpoint(renewed(eta, s_noise), lambda sigma, middle: 1.0)


def renewed(eta: float, s_noise: float) -> Renewal:
    """Of ancestral noise. Raises UserError for a negative option."""
    check_options(eta, s_noise)

    def renewal(sigma: float, sigma_next: float) -> tuple[float, float]:
        keep, add = ancestral(sigma, sigma_next, eta)
        return keep, s_noise * add

    return renewal
