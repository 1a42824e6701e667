"""Euler-ancestral ("Euler a"): an Euler step of the probability flow to below the next level, then noise up to it."""

from __future__ import annotations

from ldm.sampling.ddim import ancestral, check_options
from ldm.sampling.step import Sampler, walk


def euler_a(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """The Euler step ends at sqrt(sigma_next^2 - add^2), and a normal of deviation `s_noise` add follows.

    With x + (down - sigma) (x - D) / sigma = D + (down / sigma) (x - D) this is DDIM, step for step and for the same
    eta: eta = 1 is DDPM with the posterior variance, 0 Euler. Where DDIM refuses an eta that would add more noise than
    the next level holds, the added noise stops at sigma_next here, so a large eta draws all of it anew.
    `s_noise` other than 1 leaves the law on purpose (more texture, or less). Raises UserError for a negative option.
    """
    check_options(eta, s_noise)

    def renewal(sigma: float, sigma_next: float) -> tuple[float, float]:
        keep, add = ancestral(sigma, sigma_next, eta)
        return keep, s_noise * add

    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, renewal)
