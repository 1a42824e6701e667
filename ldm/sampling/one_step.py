"""Deterministic samplers that look at one step alone: Euler, Heun (EDM's, with churn) and DPM-Solver-2.

With s = sigma and r = sigma_next, the flow dx / dsigma = (x - D) / sigma is solved from s to r by

    x' = A + (r / s) (x - A),        A = the average of D(x(sigma), sigma) with weight sigma^-2 on r < sigma < s,

which is `flow`. Euler's method takes D(x, s) for A. The other two evaluate D a second time, D', at a level that Euler's
method reaches, and take A = D + w (D' - D). For the rules by which they are known,

    Heun, the trapezoid in sigma:          x' = x + (r - s) (d + d') / 2,  d = (x - D) / sigma:   w = s / 2r
    DPM-Solver-2, the midpoint m = sqrt(s r):  x' = x + (r - s) d':                               w = s / m

so A is no average any more (w > 1) where a step spans more than a factor of 2, or at all. That is how these methods
are, and harmless in small steps; but a leap (step.py) would return the small difference of two D thousandfold. There w
is that of a true average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.step import Noise, Renewal, Sampler, Step, flow, leaps, level, trajectory, walk

MOST_CHURN = math.sqrt(2) - 1
"""Karras et al. 2022, algorithm 2: a step's churn adds at most as much variance as there is."""


def euler() -> Sampler:
    """Euler's method on the probability flow: order 1, N evaluations in N steps. It is `ddim` with eta 0."""
    return lambda denoiser, x, sigmas, noise: walk(denoiser, x, sigmas, noise, lambda _, sigma_next: (sigma_next, 0.0))


def heun(s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Sampler:
    """Heun's method, stochastic if wanted: Karras et al. 2022, algorithm 2. Order 2.

    Where sigma is in [s_tmin, s_tmax], a step of N first adds noise of deviation `s_noise` up to the level
    (1 + min(s_churn / N, sqrt(2) - 1)) sigma; `s_churn` 0 is deterministic. The normals asked for are those of the
    step's own interval. 2 N evaluations in N steps, or 2 N - 1 if the grid ends at 0: the step to 0 is Euler's.

    Raises UserError for a negative or unknown (nan) option, an infinite s_noise, and for s_tmin > s_tmax.
    """
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax), ("s_noise", s_noise)):
        if not value >= 0:
            raise UserError(f"{name} of heun is {value:g}; choose 0 or more")
    if s_noise == math.inf:
        raise UserError("s_noise of heun is infinite; choose 1 (the law's own noise), or another factor")
    if s_tmin > s_tmax:
        raise UserError(f"s_tmin of heun is {s_tmin:g} and s_tmax {s_tmax:g}; choose s_tmin <= s_tmax")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        churn = min(s_churn / max(len(sigmas) - 1, 1), MOST_CHURN)

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            raised = sigma * (1 + churn) if s_tmin <= sigma <= s_tmax else sigma
            if raised > sigma:
                x = x + s_noise * math.sqrt(raised**2 - sigma**2) * noise(sigma, sigma_next).to(x)
            return heuns_step(denoiser, x, raised, sigma_next)

        return trajectory(x, sigmas, advance)

    return sample


def heuns_step(denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """(the state at `sigma_next`, the first x0), by two evaluations; by one, Euler's, if it is 0."""
    x0 = denoiser(x, level(sigma))
    ahead = flow(x, x0, sigma, sigma_next)
    if sigma_next > 0:
        correction = denoiser(ahead, level(sigma_next)) - x0
        ahead = flow(x, x0 + trapezoid(sigma, sigma_next) * correction, sigma, sigma_next)
    return ahead, x0


def trapezoid(sigma: float, sigma_next: float) -> float:
    """w of Heun's step, s / 2r; in a leap that of an average, D being linear in log sigma: 1/(1 - r/s) - 1/log(s/r)."""
    ratio = sigma / sigma_next
    return ratio / 2 if not leaps(sigma, sigma_next) else 1 / (1 - 1 / ratio) - 1 / math.log(ratio)


def dpm_2() -> Sampler:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1) in x0 + sigma n: the midpoint rule, the middle taken in log sigma.

    Order 2. 2 N evaluations in N steps, or 2 N - 1 if the grid ends at 0: the step to 0 is Euler's.
    """
    return by_midpoint(lambda _, sigma_next: (sigma_next, 0.0), steep)


def steep(sigma: float, middle: float) -> float:
    """w of DPM-Solver-2's midpoint rule, s / m; in a leap that of an average: D halfway stands for all."""
    return 1.0 if leaps(sigma, middle**2 / sigma) else sigma / middle


def by_midpoint(renewal: Renewal, weight: Callable[[float, float], float]) -> Sampler:
    """Two evaluations a step: to the level that `renewal` keeps by D + w (D' - D), w = weight(s, m), and its noise.

    A step that keeps no noise, as the one to 0, is Euler's.
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            keep, add = renewal(sigma, sigma_next)
            x0 = average = denoiser(x, level(sigma))
            if keep > 0:
                middle = math.sqrt(sigma) * math.sqrt(keep)
                ahead = denoiser(flow(x, x0, sigma, middle), level(middle))
                average = x0 + weight(sigma, middle) * (ahead - x0)
            x = flow(x, average, sigma, keep)
            return (x + add * noise(sigma, sigma_next).to(x) if add > 0 else x), x0

        return trajectory(x, sigmas, advance)

    return sample
