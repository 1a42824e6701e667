"""The noise schedule: the law t <-> sigma, and alpha(sigma), that a model was trained with.

The chain of Ho et al. 2020, z_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) n, keeps the variance of unit-variance
data. Divided by its alpha it reads x = x0 + sigma n with

    alpha = sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2),        sigma^2 = (1 - alpha_bar) / alpha_bar = 1 / SNR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import UserError

SIGMA_CUT = 1e6
"""Where a law that ends at infinite sigma is cut: alpha there is 1e-6, less than float32 resolves beside the noise."""

MAX_BETA = 0.999
"""Nichol & Dhariwal 2021, section 3.2: keeps the cosine law's last steps from being singular."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving law on T trained levels.

    `sigmas`: (T,) float64 on the CPU, strictly increasing and finite; index t is the network's time of that level.
    `pure_noise_end`: the last level stands for sigma = infinity (zero terminal SNR), cut at `SIGMA_CUT`.
    """

    sigmas: Tensor
    pure_noise_end: bool = False

    @property
    def steps(self) -> int:
        """T, the number of trained levels."""
        return len(self.sigmas)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The last level's sigma, always finite."""
        return float(self.sigmas[-1])

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) alpha_bar_t = 1 / (1 + sigma_t^2), decreasing. A law cut at `SIGMA_CUT` ends at 1e-12, not at 0."""
        return 1 / (1 + self.sigmas**2)

    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor between the two coordinates, z = alpha x; any shape, sigma >= 0. It is also c_in."""
        return (1 + sigma**2).rsqrt()

    def t(self, sigma: Tensor) -> Tensor:
        """The network's time of `sigma` (any shape), in [0, T - 1], on sigma's device and in its dtype.

        Linear in log sigma between trained levels and never rounded; levels outside the trained range get its ends.
        """
        level = sigma.detach().cpu().double().log()
        knots = self.sigmas.log()
        right = torch.searchsorted(knots, level).clamp(1, self.steps - 1)
        fraction = (level - knots[right - 1]) / (knots[right] - knots[right - 1])
        return (right - 1 + fraction.clamp(0, 1)).to(sigma.dtype).to(sigma.device)

    def sigma(self, t: Tensor) -> Tensor:
        """The inverse of `t`: sigma of a time in [0, T - 1] (any shape), geometric between trained levels."""
        time = t.detach().cpu().double().clamp(0, self.steps - 1)
        left = time.floor().long().clamp(max=self.steps - 2)
        knots = self.sigmas.log()
        level = torch.lerp(knots[left], knots[left + 1], time - left).exp()
        return level.to(t.dtype if t.is_floating_point() else torch.float64).to(t.device)


def linear_betas(config: ScheduleConfig) -> Tensor:
    """(T,) beta linear in t (Ho et al. 2020, section 4)."""
    return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)


def scaled_linear_betas(config: ScheduleConfig) -> Tensor:
    """(T,) sqrt(beta) linear in t (Rombach et al. 2022, called "linear" in their code)."""
    start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    return torch.linspace(start, end, config.steps, dtype=torch.float64) ** 2


def cosine_betas(config: ScheduleConfig) -> Tensor:
    """(T,) alpha_bar = cos^2 of t (Nichol & Dhariwal 2021, equation 17, s = 0.008), beta cut at `MAX_BETA`."""
    time = torch.arange(config.steps + 1, dtype=torch.float64) / config.steps
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


BETAS: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config` describes. Raises UserError for an unknown kind and for betas that are no chain."""
    if config.kind not in BETAS:
        raise UserError(f"schedule.kind is '{config.kind}'; choose one of {', '.join(BETAS)}")
    if config.steps < 2:
        raise UserError(f"schedule.steps is {config.steps}; a noise schedule needs at least 2 levels")
    if config.kind != "cosine" and not 0 < config.beta_start <= config.beta_end < 1:
        raise UserError(
            f"schedule.beta_start is {config.beta_start:g} and beta_end {config.beta_end:g}; "
            "choose 0 < beta_start <= beta_end < 1"
        )
    alphas_bar = torch.cumprod(1 - BETAS[config.kind](config), dim=0)
    if config.zero_terminal_snr:
        alphas_bar = zero_terminal_snr(alphas_bar)
    sigmas = ((1 - alphas_bar) / alphas_bar).sqrt()
    if config.zero_terminal_snr:
        sigmas[-1] = SIGMA_CUT
    if not bool(sigmas.isfinite().all() and (sigmas.diff() > 0).all()):
        raise UserError(
            f"the noise schedule reaches sigma = {float(sigmas[-2]):.3g} before its last level and cannot be resolved; "
            "use fewer steps or smaller betas"
        )
    return Schedule(sigmas, pure_noise_end=config.zero_terminal_snr)


def zero_terminal_snr(alphas_bar: Tensor) -> Tensor:
    """(T,) -> (T,): sqrt(alpha_bar) shifted so that it ends at 0 and scaled so that it starts where it did.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1.
    """
    root = alphas_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
