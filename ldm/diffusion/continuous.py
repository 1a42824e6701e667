"""Noise laws in continuous time: t <-> sigma in closed form, for tau in [0, 1]. The network is told t = 1000 tau, or
another affine function of tau.

    vp     sigma^2 = e^g - 1,  g = (beta_max - beta_min) tau^2 / 2 + beta_min tau, of the equation
           dz = -beta z / 2 dtau + sqrt(beta) dw with beta(tau) linear (Song et al. 2021, appendix C)
    ve     sigma = sigma_min (sigma_max / sigma_min)^tau (Song et al. 2021, appendix C)
    flow   sigma = tau / (1 - tau), of z = (1 - tau) x0 + tau n (Liu et al. 2023; Lipman et al. 2023)
    edm    the levels of ve, but z = x / (1 + sigma^2)^(1/2), and t = ln(sigma) / 4 (Karras et al. 2022, table 1)

A flow's "shift" a (Esser et al. 2024, equation 23), t' = a t / (1 + (a - 1) t), multiplies sigma = t / (1 - t) by a. It
moves every level of a grid and of the level draw (`Schedule.shifted`); the law, and so the time of a sigma, stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.model_config import ScheduleConfig

TIME_UNIT = 1000.0
"""A continuous law's time runs over [0, 1]; networks are told a thousand times that, as their embeddings expect."""

SIGMA_CUT = 1e6
"""Where a law that ends at infinite sigma is cut: alpha there is 1e-6, less than float32 resolves beside the noise."""


@dataclass(frozen=True)
class Clock:
    """tau <-> sigma, and how fast sigma grows. All take and give float64 tensors of any shape."""

    tau: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]  # may be infinite at tau = 1
    slope: Callable[[Tensor], Tensor]  # d ln sigma / d tau, as a function of sigma
    told: tuple[float, float] = (0.0, TIME_UNIT)  # what the network is told at tau = 0, and how much more at tau = 1

    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told at sigma."""
        return self.told[0] + self.told[1] * self.tau(sigma)

    def level(self, time: Tensor) -> Tensor:
        """Its inverse, of a time brought into the range."""
        return self.sigma(((time - self.told[0]) / self.told[1]).clamp(0, 1))


def preserving_clock(config: ScheduleConfig) -> tuple[Clock, Tensor]:
    """vp, and the T trained taus: `time_min` to 1, for at tau = 0 the reverse equation is singular."""
    low, high, first = config.beta_min, config.beta_max, config.time_min
    if not (0 <= low <= high and high > 0 and 0 < first < 1):
        raise UserError(
            f"schedule.beta_min is {low:g}, beta_max {high:g} and time_min {first:g}; "
            "choose 0 <= beta_min <= beta_max, beta_max > 0 and time_min between 0 and 1"
        )

    def tau(sigma: Tensor) -> Tensor:
        """The positive root of d tau^2 / 2 + beta_min tau = ln(1 + sigma^2), in the form that does not cancel."""
        grown = torch.log1p(sigma**2)
        return 2 * grown / (low + (low**2 + 2 * (high - low) * grown).sqrt())

    def beta(sigma: Tensor) -> Tensor:
        return low + (high - low) * tau(sigma)

    clock = Clock(
        tau,
        sigma=lambda time: torch.expm1((high - low) * time**2 / 2 + low * time).sqrt(),
        slope=lambda sigma: beta(sigma) * (1 + sigma**2) / (2 * sigma**2),
    )
    return clock, torch.linspace(first, 1, config.steps, dtype=torch.float64)


def exploding_clock(config: ScheduleConfig) -> tuple[Clock, Tensor]:
    """ve, and the T trained taus, 0 to 1."""
    low, high = config.sigma_min, config.sigma_max
    if not 0 < low < high:
        raise UserError(f"schedule.sigma_min is {low:g} and sigma_max {high:g}; choose 0 < sigma_min < sigma_max")
    span = math.log(high) - math.log(low)
    clock = Clock(
        tau=lambda sigma: (sigma / low).log() / span,
        sigma=lambda time: low * (span * time).exp(),
        slope=lambda sigma: torch.full_like(sigma, span),
    )
    return clock, torch.linspace(0, 1, config.steps, dtype=torch.float64)


def edm_clock(config: ScheduleConfig) -> tuple[Clock, Tensor]:
    """edm, and the T trained taus, 0 to 1."""
    clock, times = exploding_clock(config)
    first, last = (math.log(end) / 4 for end in (config.sigma_min, config.sigma_max))
    return replace(clock, told=(first, last - first)), times


def flow_clock(config: ScheduleConfig) -> tuple[Clock, Tensor]:
    """flow, and the T trained taus, 1 / T to 1, where sigma is infinite (cut, and still told as 1)."""
    clock = Clock(
        tau=lambda sigma: torch.where(sigma >= SIGMA_CUT, 1.0, sigma / (1 + sigma)),
        sigma=lambda time: time / (1 - time),
        slope=lambda sigma: (1 + sigma) ** 2 / sigma,
    )
    return clock, torch.arange(1, config.steps + 1, dtype=torch.float64) / config.steps


CLOCKS: dict[str, Callable[[ScheduleConfig], tuple[Clock, Tensor]]] = {
    "vp": preserving_clock,
    "ve": exploding_clock,
    "flow": flow_clock,
    "edm": edm_clock,
}
