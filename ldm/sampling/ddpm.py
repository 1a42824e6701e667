"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) on any grid of levels.

Bayes' rule for x' at level r given x at level s and x0 (their equation 7, in x = x0 + sigma n):

    x' ~ N(x0 + (r / s)^2 (x - x0),  r^2 (1 - r^2 / s^2))
"""

from __future__ import annotations

import math

from ldm.errors import UserError
from ldm.sampling.step import Law, Sampler, walk


def posterior(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The posterior's own variance: right if the data were a single point (beta-tilde)."""
    return sigma_next**2 / sigma, sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


def beta(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The same mean with the forward step's variance: right if the data were N(0, I) already.

    beta = 1 - alpha_bar / alpha_bar_next of the variance-preserving chain, divided by alpha_bar_next, is
    (s^2 - r^2) (1 + r^2) / (1 + s^2). The step to 0 adds none, as in algorithm 2.
    """
    keep, _ = posterior(sigma, sigma_next)
    if sigma_next == 0:
        return keep, 0.0
    return keep, math.sqrt((sigma**2 - sigma_next**2) * (1 + sigma_next**2) / (1 + sigma**2))


VARIANCES: dict[str, Law] = {"posterior": posterior, "beta": beta}


def ddpm(variance: str = "posterior") -> Sampler:
    """`variance`: posterior (beta-tilde) or beta, the two of Ho et al. 2020, section 3.2. Raises UserError."""
    if variance not in VARIANCES:
        raise UserError(f"the variance of ddpm is '{variance}'; choose one of {', '.join(VARIANCES)}")
    law = VARIANCES[variance]
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, law)
