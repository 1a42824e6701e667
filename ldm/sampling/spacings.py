"""The grids: (schedule, N) -> the N + 1 levels from the law's last one down, N steps asked being N steps run.

On the trained levels t = 0 .. T - 1, so N is at most T. The first three are those of Lin et al. 2024, table 2:

    trailing      t = round(T - i T / N) - 1, then sigma = 0. Starts at the last level: right for few steps.
    linspace      N levels evenly from T - 1 to 0, then sigma = 0 (a single step starts at T - 1).
    leading       t = i (T // N) + 1 for i = N - 1 .. 0, then the smallest trained level, t = 0, not sigma = 0. This is
                  the original DDIM's grid, as Stable Diffusion was released with it (the offset of 1 and
                  "set_alpha_to_one" false): it starts short of the last level by about T / N, so it needs many steps.
                  N = T leaves no room for the offset and is the full chain, which ends at 0.
    ddim_uniform  the same levels, then sigma = 0. (Where N does not divide T, ComfyUI's runs more steps than asked.)
    dpm_leading   t = i (T // (N + 1)) + 1 for i = N .. 1, then sigma = 0: DPM-Solver++'s own leading, in diffusers.
                  For N of T - 1 and T there is no room, and it is trailing.
    simple        t = T - 1 - floor(i T / N), then sigma = 0: trailing, rounded the other way.
    lcm           N of the 50 levels t = round(j T / 50) - 1 that latent consistency models were distilled on, evenly
                  from the last (Luo et al. 2023), then sigma = 0. At most 50.

In the network's own time, not rounded to trained levels, for any N; then sigma = 0:

    normal        N times evenly from the last to the first, both included: linspace without its rounding.
    uniform       the same, and a flow's shift moves its last level twice: Stable Diffusion 3 is drawn so.
    sgm_uniform   the first N of N + 1 such times, so that the last step is as long as the others.
    beta          times at the quantiles 1, 1 - 1 / N .. 1 / N of Beta(0.6, 0.6): dense at both ends (Lee et al. 2024).

Formulas in sigma between the law's ends, for any N:

    karras        N levels, even in sigma^(1/rho), rho 7, then sigma = 0 (Karras et al. 2022, equation 5).
    exponential   N levels, even in log sigma, then sigma = 0: a last step removes what noise is left at sigma_min.
    polyexponential   N levels, log sigma falling as the rho-th power of an even ramp, then 0; rho 1 is exponential,
                  more is denser at the small levels.
    kl_optimal    N levels, even in arctan sigma, then 0: the best for Gaussian data (Sabour et al. 2024, theorem 3.1).
    logsnr        N + 1 levels, even in log SNR = -2 log sigma, and no 0: as in DPM-Solver (Lu et al. 2022).
                  The spacing is that of `exponential`; what differs is that it ends at sigma_min, so every step is of
                  one length and none is left to the first order.
    ays_sd15, ays_sdxl, ays_svd   "Align your steps" (Sabour et al. 2024, table 3): the levels found for 10 steps of
                  three models, read between in log sigma for another N; the last one, 0.029 or 0.002, is 0 here.

A model of rectified flow may have a shift (Esser et al. 2024), which moves all levels of the grids in t and none of
the formulas in sigma.

Between the levels at which anything is to be seen, that is. A law that begins beyond `HIGHEST` (zero terminal SNR, a
flow, the cosine law) would have these spend most of their steps in pure noise, where nothing happens. They are
spaced from `HIGHEST` down, and their first level alone is then moved up to where the law begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError

RHO = 7.0
"""Karras et al. 2022, appendix D.1: 3 makes the errors of all steps even, 5 to 10 makes better pictures."""

HIGHEST = 160.0
"""The SNR of unit-variance data is 4e-5 there. Just above the continuous variance-preserving law's end, 152."""

LCM_LEVELS = 50
"""Levels that latent consistency models are distilled on."""

ALIGNED = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}

Grid = Callable[..., Tensor]
"""(schedule, steps), and rho where it has one -> (steps + 1,) levels."""

# ---------------------------------------------------------------- on the trained levels


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) from the last trained level to 0, evenly from the end."""
    spans = torch.arange(steps, dtype=torch.float64) * (schedule.steps / steps)
    return _to_zero(_trained(schedule, (schedule.steps - spans).round() - 1))


def linspace(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) over all trained levels, both ends included, then 0."""
    return _to_zero(_trained(schedule, torch.linspace(schedule.steps - 1, 0, steps, dtype=torch.float64).round()))


def leading(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly from the beginning, down to the schedule's smallest level."""
    if steps == schedule.steps:
        return trailing(schedule, steps)
    return torch.cat([ddim_uniform(schedule, steps)[:-1], _trained(schedule, torch.zeros(1))])


def ddim_uniform(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly from the beginning, then 0."""
    if steps == schedule.steps:
        return trailing(schedule, steps)
    return _to_zero(_trained(schedule, torch.arange(steps - 1, -1, -1) * (schedule.steps // steps) + 1))


def dpm_leading(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly from the beginning, without its first, then 0."""
    if steps >= schedule.steps - 1:
        return trailing(schedule, steps)
    return _to_zero(_trained(schedule, torch.arange(steps, 0, -1) * (schedule.steps // (steps + 1)) + 1))


def simple(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) from the last trained level to 0."""
    return _to_zero(_trained(schedule, schedule.steps - 1 - torch.arange(steps) * schedule.steps // steps))


def lcm(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) of the levels of a distillation, then 0. Raises UserError for more than there are."""
    levels = min(LCM_LEVELS, schedule.steps)
    if steps > levels:
        raise UserError(f"{steps} steps were asked for; the lcm spacing has {levels} levels: choose that or fewer")
    distilled = levels - torch.arange(steps) * levels // steps
    return _to_zero(_trained(schedule, (distilled * (schedule.steps / levels)).round() - 1))


# ---------------------------------------------------------------- in the network's time


def normal(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in t from the last level to the first, then 0."""
    return _at(schedule, np.linspace(1, 0, steps))


def sgm_uniform(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in t from the last level, the step to 0 as long as the others."""
    return _at(schedule, np.linspace(1, 0, steps + 1)[:-1])


def beta(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) at the quantiles of a beta law, then 0."""
    return _at(schedule, beta_quantiles(1 - np.arange(steps) / steps))


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in t from the last trained level to the first with its shift, all of that shifted; then 0."""
    first = float(schedule.t(schedule.shifted(schedule.sigmas[0])))
    times = torch.linspace(schedule.t_max, first, steps, dtype=torch.float64)
    return _to_zero(schedule.shifted(schedule.sigma(times)))


def beta_quantiles(shares: np.ndarray, a: float = 0.6) -> np.ndarray:
    """Where the distribution function of Beta(a, a) reaches each of `shares`: by bisection in u^a, on its power series.

    The law is symmetric, so the series is needed for u <= 1/2 alone, where it gains a bit with each term.
    """
    n = np.arange(64)
    terms = np.cumprod(np.r_[1.0, (n[1:] - a) / n[1:]]) / (a + n)

    def mass(power: np.ndarray) -> np.ndarray:
        return power * (power[..., None] ** (n / a) @ terms)

    wanted = np.minimum(shares, 1 - shares) * 2 * mass(np.array(0.5**a))
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5**a)
    for _ in range(60):
        middle = (low + high) / 2
        below = mass(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    u = high ** (1 / a)
    return np.where(shares <= 0.5, u, 1 - u)


def _at(schedule: Schedule, shares: np.ndarray) -> Tensor:
    """Times from the first level's, at 0, to the last one's, at 1."""
    times = schedule.t_min + torch.from_numpy(shares) * (schedule.t_max - schedule.t_min)
    sigmas = schedule.sigma(times)
    sigmas[0] = schedule.sigma_max
    return _to_zero(schedule.shifted(sigmas))


# ---------------------------------------------------------------- formulas in sigma


def karras(schedule: Schedule, steps: int, rho: float = RHO) -> Tensor:
    """(N + 1,) evenly in sigma^(1 / rho) from sigma_max to sigma_min, then 0."""
    return _to_zero(_between(schedule, steps, lambda sigma: sigma ** (1 / rho), lambda root: root**rho))


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in log sigma from sigma_max to sigma_min, then 0."""
    return _to_zero(_between(schedule, steps, math.log, torch.exp))


def polyexponential(schedule: Schedule, steps: int, rho: float = 1.0) -> Tensor:
    """(N + 1,) from sigma_max to sigma_min, log sigma an even ramp to the power rho, then 0."""
    low = math.log(schedule.sigma_min)
    span = math.log(min(schedule.sigma_max, HIGHEST)) - low
    forth: Callable[[float], float] = lambda sigma: max((math.log(sigma) - low) / span, 0.0) ** (1 / rho)  # noqa: E731
    return _to_zero(_between(schedule, steps, forth, lambda ramp: (low + span * ramp**rho).exp()))


def kl_optimal(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in arctan sigma from sigma_max to sigma_min, then 0."""
    return _to_zero(_between(schedule, steps, math.atan, torch.tan))


def logsnr(schedule: Schedule, steps: int) -> Tensor:
    """(N + 1,) evenly in log sigma from sigma_max to sigma_min, where it ends."""
    return _between(schedule, steps + 1, math.log, torch.exp)


def aligned(name: str) -> Grid:
    """The grid of a table of `ALIGNED`: (N + 1,) from the law's own last level to 0.

    It raises UserError for a law that does not reach over the table's levels.
    """

    def grid(schedule: Schedule, steps: int) -> Tensor:
        table = np.log(ALIGNED[name])
        between = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(table)), table)
        levels = np.exp(between)[1:-1]
        if len(levels) and not schedule.sigma_min * 0.99 <= levels[-1] <= levels[0] < schedule.sigma_max:
            raise UserError(
                f"the spacing {name} has levels from {levels[0]:.3g} to {levels[-1]:.3g}, and the model's noise "
                f"schedule ends at {schedule.sigma_max:.3g} and begins at {schedule.sigma_min:.3g}; choose another"
            )
        return _to_zero(torch.tensor([schedule.sigma_max, *levels], dtype=torch.float64))

    return grid


def _trained(schedule: Schedule, times: Tensor) -> Tensor:
    return schedule.shifted(schedule.sigmas[times.long()])


def _to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def _between(
    schedule: Schedule, count: int, forth: Callable[[float], float], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """`count` levels evenly spaced in `forth` of sigma, from the schedule's sigma_max to its sigma_min, both exact."""
    high, low = min(schedule.sigma_max, HIGHEST), schedule.sigma_min
    sigmas = back(torch.linspace(forth(high), forth(low), count, dtype=torch.float64))
    sigmas[-1] = low
    sigmas[0] = schedule.sigma_max
    return sigmas


TRAINED_GRIDS: dict[str, Grid] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "ddim_uniform": ddim_uniform,
    "dpm_leading": dpm_leading,
    "simple": simple,
    "lcm": lcm,
}
GRIDS: dict[str, Grid] = {
    **TRAINED_GRIDS,
    "normal": normal,
    "uniform": uniform,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "kl_optimal": kl_optimal,
    "logsnr": logsnr,
    **{name: aligned(name) for name in ALIGNED},
}
