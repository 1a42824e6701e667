"""Deterministic samplers that remember earlier predictions of x0: DPM-Solver++ (2M) and UniPC; more in adams.py.

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
from ldm.sampling.step import Noise, Sampler, Step, flow, level, trajectory


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

    So they do in fewer than 2 `order` steps on any grid, where most of the way is begun with too little to remember: on
    a Gaussian order 3 in 5 steps of leading is .14 off the flow so, and .62 without; in 10 .16 and .13.
    """
    if order not in (1, 2, 3):
        raise UserError(f"the order of unipc is {order}; choose 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise UserError(f"the variant of unipc is '{variant}'; choose bh1 or bh2")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        known: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (sigma, D), the newest last
        steps_left = len(sigmas) - 1
        lowered = sigmas[-1] == 0 or steps_left < 2 * order
        start, used = x, 0  # of the step before: its state, and how many evaluations it used

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            nonlocal start, used, steps_left
            x0 = denoiser(x, level(sigma))
            if used:
                x = _combine(start, list(known)[-used:], sigma, variant, (sigma, x0))
            known.append((sigma, x0))
            start, used = x, min(len(known), steps_left if lowered else order)
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
