"""Explicit multistep methods: the flow's own integral over what was predicted before, continued as a polynomial.

Along the probability flow, with eps = (x - D) / sigma, from s = sigma to r = sigma_next,

    x(r) = x(s) + integral_s^r eps dsigma        and        x(r) / r = x(s) / s + integral_s^r D d(1 / sigma),

both exact. N evaluations in N steps; the methods differ in what they continue, and in which variable:

    lms            eps, a polynomial in sigma: Adams and Bashforth's on the grid's own levels, as in k-diffusion
    deis           eps, a polynomial in log sigma (Zhang & Chen 2023, tAB-DEIS in log rho)
    res_multistep  D, a polynomial in log sigma: exponential Adams-Bashforth (Zhang et al. 2023, "Improved order
                   analysis and design of exponential integrator for diffusion models sampling", RES)
    plms, ipndm    eps, by the factors that are right for equal steps in sigma, whatever the grid's
    gradient_estimation    eps, doubled less the last one (Permenter & Yuan 2024)

The first steps have fewer to remember, down to Euler's. The step to 0 is Euler's too, D: nothing in log sigma reaches
0, and the factors of equal steps know of no end. lms alone goes there as everywhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.one_step import trapezoid
from ldm.sampling.step import Noise, Sampler, Step, flow, level, trajectory

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Number of slopes -> their factors, the newest first."""

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(32)  # exact for lms; to rounding for the others in any usual step

Factors = Callable[[Sequence[float], float], Sequence[float]]
"""(levels of what is remembered, the newest first; sigma_next) -> the factor of each in x(r) - x(s), or of each D."""


def lms(order: int = 4) -> Sampler:
    """Linear multistep of `order` 1 to 4. Raises UserError for another."""

    def factors(levels: Sequence[float], end: float) -> Sequence[float]:
        return integrals(levels, end, np.ones_like)

    return _remembering(_checked("lms", order), factors, to_zero=True)


def deis(order: int = 2) -> Sampler:
    """DEIS of `order` 1 to 4: 3 is nearer to the flow without guidance, 2 under a large scale.

    Raises UserError for another.
    """

    def factors(levels: Sequence[float], end: float) -> Sequence[float]:
        return integrals([math.log(each) for each in levels], math.log(end), np.exp)

    return _remembering(_checked("deis", order), factors)


def res_multistep(order: int = 2) -> Sampler:
    """RES of `order` 1 to 4; 2 and 3 are `dpmpp_2m_sde` (solver heun) and `dpmpp_3m_sde` without their noise.

    Raises UserError for another.
    """

    def factors(levels: Sequence[float], end: float) -> Sequence[float]:
        return integrals([math.log(each) for each in levels], math.log(end), lambda u: -end * np.exp(-u))

    return _remembering(_checked("res_multistep", order), factors, of_eps=False)


def ipndm(order: int = 4) -> Sampler:
    """PNDM without a start of its own (Zhang & Chen 2023, "iPNDM"): `order` 1 to 4, reached where steps are equal in
    sigma; 2 elsewhere is too much to say, 1 is not. Raises UserError for another order."""
    return _remembering(_checked("ipndm", order), _as_if_equal)


def gradient_estimation(gamma: float = 2.0) -> Sampler:
    """The slope gamma eps + (1 - gamma) eps_before (Permenter & Yuan 2024, algorithm 2): 1 is Euler, 1.5 Adams and
    Bashforth's for equal steps; 2 goes beyond, against the error of the prediction. Raises UserError for a number that
    is not finite."""
    if not math.isfinite(gamma):
        raise UserError(f"the gamma of gradient_estimation is {gamma:g}; choose a finite number, such as 2")

    def factors(levels: Sequence[float], end: float) -> Sequence[float]:
        weights = (gamma, 1 - gamma) if len(levels) == 2 else (1.0,)
        return [(end - levels[0]) * weight for weight in weights]

    return _remembering(2, factors)


def plms() -> Sampler:
    """Pseudo linear multistep (Liu et al. 2022, PNDM without its Runge-Kutta start), as Stable Diffusion was released.

    The eps = (x - D) / sigma of up to four steps are combined as Adams and Bashforth do for equal spacing, whatever
    the grid's, and DDIM's step is taken with that. So the order is 2, unless the grid is uniform in sigma.
    N + 1 evaluations in N steps: the first step has none to remember and is Heun's. The step to 0 is Euler's (a single
    step to 0 is one evaluation).
    """
    return _remembering(4, _as_if_equal, heun_first=True)


def _as_if_equal(levels: Sequence[float], end: float) -> Sequence[float]:
    return [(end - levels[0]) * factor for factor in ADAMS_BASHFORTH[len(levels)]]


def _remembering(
    order: int, factors: Factors, of_eps: bool = True, to_zero: bool = False, heun_first: bool = False
) -> Sampler:
    """The method of these `factors` of up to `order` slopes eps, or D; `to_zero`: in the step to 0 too."""

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        known: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (sigma, eps or D), the newest first

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            known.appendleft((sigma, (x - x0) / sigma if of_eps else x0))
            ahead = flow(x, x0, sigma, sigma_next)
            if sigma_next == 0 and not to_zero:
                return ahead, x0
            if heun_first and len(known) == 1:
                correction = denoiser(ahead, level(sigma_next)) - x0
                return flow(x, x0 + trapezoid(sigma, sigma_next) * correction, sigma, sigma_next), x0
            # The factors add up to Euler's one. As corrections to Euler's step, nothing large cancels.
            for factor, (_, slope) in zip(factors([at for at, _ in known], sigma_next), known, strict=True):
                ahead = ahead + factor * (slope - known[0][1])
            return ahead, x0

        return trajectory(x, sigmas, advance)

    return sample


def integrals(points: Sequence[float], end: float, density: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Of each Lagrange polynomial through `points` times `density`, from the first point to `end`, by Gauss's rule."""
    half = (end - points[0]) / 2
    u = points[0] + half * (1 + POINTS)
    scale = half * WEIGHTS * density(u)
    others = [[(u - other) / (point - other) for other in points if other != point] for point in points]
    return [float(scale @ np.prod([np.ones_like(u), *factors], axis=0)) for factors in others]


def _checked(name: str, order: int) -> int:
    if order not in (1, 2, 3, 4):
        raise UserError(f"the order of {name} is {order}; choose 1, 2, 3 or 4")
    return order
