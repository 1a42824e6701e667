"""Deterministic samplers that remember earlier evaluations: PLMS, DPM-Solver++ (2M) and UniPC.

Each step is `flow` with an average A of the denoiser's predictions now and before (see one_step.py). In lambda =
-log sigma, with h = log(sigma / sigma_next), the exact average is

    A = 1 / (1 - e^-h) integral_0^h e^(tau - h) D(lambda + tau) dtau,

and DPM-Solver++ and UniPC put the polynomial through the remembered D in its place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.one_step import trapezoid
from ldm.sampling.step import Noise, Sampler, Step, flow, level, trajectory

ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Number of slopes -> their factors, the newest first."""


def plms() -> Sampler:
    """Pseudo linear multistep (Liu et al. 2022, PNDM without its Runge-Kutta start), as Stable Diffusion was released.

    The eps = (x - D) / sigma of up to four steps are combined as Adams and Bashforth do for equal spacing, whatever
    the grid's, and DDIM's step is taken with that. So the order is 2, unless the grid is uniform in sigma.
    N + 1 evaluations in N steps: the first step has none to remember and is Heun's. The step to 0 is Euler's (a single
    step to 0 is one evaluation).
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        slopes: deque[Tensor] = deque(maxlen=4)  # the newest first

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            slopes.appendleft((x - x0) / sigma)
            ahead = flow(x, x0, sigma, sigma_next)
            if sigma_next == 0:
                return ahead, x0
            if len(slopes) == 1:
                correction = denoiser(ahead, level(sigma_next)) - x0
                return flow(x, x0 + trapezoid(sigma, sigma_next) * correction, sigma, sigma_next), x0
            # The factors add up to 1. As corrections to Euler's step, nothing large cancels.
            for factor, slope in zip(ADAMS_BASHFORTH[len(slopes)], slopes, strict=True):
                ahead = ahead + (sigma_next - sigma) * factor * (slope - slopes[0])
            return ahead, x0

        return trajectory(x, sigmas, advance)

    return sample


def dpmpp_2m() -> Sampler:
    """DPM-Solver++ (2M) (Lu et al. 2022b, algorithm 2): order 2, N evaluations in N steps.

    A = D + (h / 2 h_before) (D - D_before). The first step and the one to 0 are Euler's.
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        before: deque[tuple[float, Tensor]] = deque(maxlen=1)  # (sigma, D) of the last step

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = average = denoiser(x, level(sigma))
            if before and sigma_next > 0:
                higher, earlier = before[0]
                average = x0 + math.log(sigma / sigma_next) / math.log(higher / sigma) / 2 * (x0 - earlier)
            before.append((sigma, x0))
            return flow(x, average, sigma, sigma_next), x0

        return trajectory(x, sigmas, advance)

    return sample


def unipc(order: int = 2, variant: str = "bh2") -> Sampler:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), predicting x0: N evaluations in N steps.

    Each step predicts with `order` evaluations, 1 to 3; the next step's evaluation first corrects where it started,
    which costs nothing more. The order reached is `order` + 1 where all steps but the last are corrected. On grids that
    end at 0 the last steps use fewer evaluations, and the step to 0 is Euler's, uncorrected. `variant`: bh1 or bh2, the
    paper's B(h); it matters only where two evaluations are combined. Raises UserError.
    """
    if order not in (1, 2, 3):
        raise UserError(f"the order of unipc is {order}; choose 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise UserError(f"the variant of unipc is '{variant}'; choose bh1 or bh2")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        known: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (sigma, D), the newest last
        steps_left = len(sigmas) - 1
        start, used = x, 0  # of the step before: its state, and how many evaluations it used

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            nonlocal start, used, steps_left
            x0 = denoiser(x, level(sigma))
            if used:
                x = _combine(start, list(known)[-used:], sigma, variant, (sigma, x0))
            known.append((sigma, x0))
            start, used = x, min(len(known), steps_left if sigmas[-1] == 0 else order)
            steps_left -= 1
            return _combine(x, list(known)[-used:], sigma_next, variant), x0

        return trajectory(x, sigmas, advance)

    return sample


def _combine(
    x: Tensor,
    known: Sequence[tuple[float, Tensor]],
    sigma_next: float,
    variant: str,
    ahead: tuple[float, Tensor] | None = None,
) -> Tensor:
    """The state at `sigma_next` from `x` at the newest level of `known`, by the polynomial through all (sigma, D).

    `ahead`, D at the step's own end, makes it the corrector.
    """
    sigma, x0 = known[-1]
    others = [*known[:-1], *([ahead] if ahead else [])]
    moved = flow(x, x0, sigma, sigma_next)
    if not others:
        return moved
    h = math.log(sigma / sigma_next)
    weights = _weights([math.log(sigma / level) / h for level, _ in others], h, variant)
    for weight, (_, other) in zip(weights, others, strict=True):
        moved = moved + weight * (other - x0)
    return moved


def _weights(nodes: Sequence[float], h: float, variant: str) -> list[float]:
    """Of D_k - D at `nodes`, where the step is from 0 to 1: sum_k w_k u_k^i = m_i for i = 1 .. K, and

    m_i = h integral_0^1 e^(h (u - 1)) u^i du = 1 - (i / h) m_(i-1),        m_0 = 1 - e^-h.

    A single difference takes B(h) / 2 for m_1 (the paper's a_1 = 1/2): h for bh1, 1 - e^-h for bh2.
    """
    moment = -math.expm1(-h)
    if len(nodes) == 1:
        return [(h if variant == "bh1" else moment) / (2 * nodes[0])]
    moments = []
    for i in range(1, len(nodes) + 1):
        moment = 1 - i / h * moment
        moments.append(moment)
    powers = torch.tensor([[node**i for node in nodes] for i in range(1, len(nodes) + 1)], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
