"""The exact likelihood of the probability flow (Song et al. 2021, "Score-based generative modeling", appendix D.2).

The flow of x = x0 + sigma n is dx / dsigma = (x - D) / sigma, and along it d ln p / dsigma = -div((x - D) / sigma). It
is solved here in u = ln sigma and y = x / sqrt(1 + sigma^2), which stays near 1 at every level:

    dy/du = y / (1 + sigma^2) - D / sqrt(1 + sigma^2),        d ln p_y / du = -(d / (1 + sigma^2) - tr dD/dx)

Both vanish on data N(0, I), so the solver spends its steps on what differs from that. The density is that of the level
sigma_min, the data with that much noise: no more is possible where the flow is singular, and no chain is involved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.trace import field_and_trace
from ldm.errors import UserError

SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


@dataclass(frozen=True, eq=False)
class FlowDensity:
    """`log_density` (B,): ln p(x), nats, float64 on the CPU; `evaluations` (B,): of the denoiser, with its trace."""

    log_density: Tensor
    evaluations: Tensor


def flow_log_density(
    denoiser: Denoiser | Sequence[Denoiser],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    start: float,
    probes: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "dopri5",
) -> FlowDensity:
    """ln p at `x` (B, C, h, w), of the law that the flow makes of N(0, start^2) at sigma_max, at sigma_min.

    Each picture is integrated by itself, with its own adaptive steps: none changes another's figure, by a single bit.

    Args:
        denoiser: differentiable in x and evaluated on one picture, (1, C, h, w), at a time; where they are
            conditioned differently, a sequence of one denoiser for each.
        start: the deviation of the start law, the schedule's start_scale(sigma_max).
        probes: (B, P, C, h, w) of `draw_probes`, kept along the whole path, so that the right side is one smooth
            function (Grathwohl et al. 2019); None computes the exact trace, in low dimension.
        rtol, atol: of y and of ln p per dimension, step by step, each by itself.
        solver: one of `SOLVERS`, adaptive methods of torchdiffeq.

    May be called under `torch.no_grad()`, not in inference mode. Raises UserError for levels that do not increase, an
    unknown solver, and a flow that cannot be solved to these tolerances.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"the flow goes from sigma {sigma_min:g} to {sigma_max:g}; it needs 0 < sigma_min < sigma_max")
    if solver not in SOLVERS:
        raise UserError(f"the solver is '{solver}'; choose one of {', '.join(SOLVERS)}")
    if not (rtol > 0 and atol > 0):
        raise UserError(f"the tolerances are {rtol:g} and {atol:g}; they must be more than 0")
    each = [denoiser] * len(x) if callable(denoiser) else denoiser
    if len(each) != len(x):
        raise UserError(f"there are {len(each)} denoisers for {len(x)} pictures; give one, or one for each")
    found = [
        _one(each[i], x[i : i + 1], (sigma_min, sigma_max), start, None if probes is None else probes[i : i + 1],
             (rtol, atol), solver)
        for i in range(len(x))
    ]  # fmt: skip
    values, evaluations = zip(*found, strict=True)
    return FlowDensity(torch.tensor(values, dtype=torch.float64), torch.tensor(evaluations))


def _one(
    denoiser: Denoiser,
    x: Tensor,
    levels: tuple[float, float],
    start: float,
    probes: Tensor | None,
    tolerances: tuple[float, float],
    solver: str,
) -> tuple[float, int]:
    """(ln p, evaluations) of one picture (1, C, h, w)."""
    from torchdiffeq import odeint  # brings scipy, which costs half a second

    (low, high), d, count = levels, x.numel(), 0
    probes = None if probes is None else probes.to(x)

    def slope(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        y, _ = state
        # The solver feels its way with a first step of its own choice, which may lead anywhere.
        sigma = u.detach().cpu().double().clamp(math.log(low), math.log(high)).exp()
        size = math.hypot(1, float(sigma))
        denoised, trace = field_and_trace(lambda point: denoiser(point, sigma), y * size, probes)
        return y / size**2 - denoised / size, (1 / size**2 - trace / d)

    # ln p is carried per dimension and as a tensor of its own, so that the error's norm sees it beside all of y.
    state = (x / math.hypot(1, low), torch.zeros(1, dtype=x.dtype, device=x.device))
    span = torch.tensor([math.log(low), math.log(high)], dtype=x.dtype, device=x.device)
    rtol, atol = tolerances
    try:
        with torch.no_grad():
            # The last step ends where the flow does, not beyond it.
            options = {"dtype": x.dtype, "step_t": span[1:]}
            y, change = odeint(slope, state, span, rtol=rtol, atol=atol, method=solver, options=options)
    except AssertionError as error:  # how torchdiffeq says that a step shrank to nothing
        raise UserError(
            f"the flow could not be solved ({error}); use larger tolerances or a higher precision"
        ) from error
    end = start / math.hypot(1, high)  # the start law's deviation in y
    normal = -0.5 * (float((y[-1].double() / end).square().sum()) + d * math.log(2 * math.pi * end**2))
    return normal + d * float(change[-1]) - d * math.log(math.hypot(1, low)), count
