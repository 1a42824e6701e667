"""SDE-DPM-Solver++ (Lu et al. 2022, "DPM-Solver++", section 4.4 and appendix): exponential integrators of the SDE.

Among the reverse SDEs with the same marginals take the one with eta times the reverse diffusion's noise variance. In
lambda = -log sigma, with x = x0 + sigma n,

    dx = (1 + eta) (D(x, lambda) - x) dlambda + sqrt(2 eta) sigma dW.

For a D that stays the same, a step of h = log(s / r) is solved exactly, noise included:

    x' = D + e^(-(1 + eta) h) (x - D) + r sqrt(1 - e^(-2 eta h)) n,

and what the three samplers differ in is how they see D change within the step. eta = 0 is the deterministic
DPM-Solver++ of the same order. The error in law of all three falls as h^2, of the two multistep ones on smooth
grids, where the noise of the step before stands for this one's; that of each path falls as h.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.ddim import ancestral, check_options
from ldm.sampling.step import Noise, Sampler, Step, level, trajectory

Past = Sequence[tuple[float, Tensor]]
"""Of the steps before, latest first: (h, the step's length in lambda; D (B, C, h, w) at its beginning)."""

Correction = Callable[[float, float, Tensor, Past], Tensor | float]
"""((1 + eta) h, h, D, past) -> what D's change within the step adds to x'."""

SOLVERS = ("midpoint", "heun")


def dpmpp_2m_sde(eta: float = 1.0, s_noise: float = 1.0, solver: str = "midpoint") -> Sampler:
    """One evaluation a step: D is continued linearly from the step before.

    `solver`: the line's value at the middle of the step (midpoint), or its exact integral (heun). `s_noise` scales the
    noise. Raises UserError for negative options and another solver.
    """
    check_options(eta, s_noise)
    if solver not in SOLVERS:
        raise UserError(f"the solver of dpmpp_2m_sde is '{solver}'; choose one of {', '.join(SOLVERS)}")

    def correction(z: float, h: float, x0: Tensor, past: Past) -> Tensor | float:
        if not past:
            return 0.0
        change = (x0 - past[0][1]) * (h / past[0][0])  # of D over this step
        return (-math.expm1(-z) / 2 if solver == "midpoint" else phi(z)) * change

    return _multistep(eta, s_noise, correction)


def dpmpp_3m_sde(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """One evaluation a step: D is continued as the parabola through the two steps before, integrated exactly.

    The first step has no step before, the second one only. With eta = 0 it is of order 3 where those two do no harm,
    from a sigma far above the data. (The published codes weigh the parabola's curvature by half, as if a divided
    difference were a derivative, and are of order 2.) Raises UserError for negative options.
    """
    check_options(eta, s_noise)

    def correction(z: float, h: float, x0: Tensor, past: Past) -> Tensor | float:
        if not past:
            return 0.0
        # Divided differences of D in units of this step, u = (lambda - lambda_s) / h.
        back = past[0][0] / h
        slope = (x0 - past[0][1]) / back
        if len(past) == 1:
            return phi(z) * slope
        further = past[1][0] / h
        bend = (slope - (past[0][1] - past[1][1]) / further) / (back + further)
        # D(u) = D + slope u + bend u (u + back)
        return phi(z) * (slope + bend * back) + square(z) * bend

    return _multistep(eta, s_noise, correction)


def dpmpp_sde(eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Two evaluations a step: D is taken at the middle of the step in log sigma, reached by a step of its own.

    Here eta is that of DDIM and euler_a (no more is added than sigma_next). The two noises lie over [s, middle] and
    [s, r] and belong together: on a `BrownianPath` the error in law falls as h^2, with independent ones only as h. The
    step to 0 takes one evaluation; `Step.x0` is the last one made. Raises UserError for negative options.
    """
    check_options(eta, s_noise)

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        def reach(x: Tensor, x0: Tensor, sigma: float, end: float) -> Tensor:
            keep, add = ancestral(sigma, end, eta)
            ahead = x0 + (keep / sigma) * (x - x0)
            return ahead + s_noise * add * noise(sigma, end).to(x) if s_noise * add > 0 else ahead

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            if sigma_next == 0:
                return x0, x0
            middle = math.sqrt(sigma * sigma_next)
            x0 = denoiser(reach(x, x0, sigma, middle), level(middle))
            return reach(x, x0, sigma, sigma_next), x0

        return trajectory(x, sigmas, advance)

    return sample


def phi(z: float) -> float:
    """z times the integral of e^(-z (1 - u)) u over u in [0, 1], 1 - (1 - e^-z) / z: the weight of D's slope."""
    if z < 1e-2:  # the closed form cancels
        return z * (1 / 2 - z * (1 / 6 - z * (1 / 24 - z * (1 / 120 - z / 720))))
    return 1 + math.expm1(-z) / z


def square(z: float) -> float:
    """z times the integral of e^(-z (1 - u)) u^2 over u in [0, 1]: the weight of D's curvature."""
    if z < 1e-2:
        return z * (1 / 3 - z * (1 / 12 - z * (1 / 60 - z * (1 / 360 - z / 2520))))
    return 1 - 2 * phi(z) / z


def _multistep(eta: float, s_noise: float, correction: Correction) -> Sampler:
    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: deque[tuple[float, Tensor]] = deque(maxlen=2)

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            if sigma_next == 0:
                return x0, x0
            h = math.log(sigma / sigma_next)
            z = (1 + eta) * h
            x = x0 + math.exp(-z) * (x - x0) + correction(z, h, x0, past)
            past.appendleft((h, x0))
            add = s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
            return (x + add * noise(sigma, sigma_next).to(x) if add > 0 else x), x0

        return trajectory(x, sigmas, advance)

    return sample
