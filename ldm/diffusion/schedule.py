"""The noise schedule: the law t <-> sigma, and alpha(sigma), that a model was trained with.

The chain of Ho et al. 2020, z_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) n, keeps the variance of unit-variance
data. Divided by its alpha it reads x = x0 + sigma n with

    alpha = sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2),        sigma^2 = (1 - alpha_bar) / alpha_bar = 1 / SNR.

Other laws have another alpha: 1 where variance explodes, 1 / (1 + sigma) on the straight paths of rectified flow. The
chains are tables of T levels, made here of their betas; laws in continuous time are in continuous.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.continuous import CLOCKS, SIGMA_CUT, Clock
from ldm.errors import UserError
from ldm.model_config import ScheduleConfig

MAX_BETA = 0.999
"""Nichol & Dhariwal 2021, section 3.2: keeps the last steps of laws that end in noise from being singular."""


@dataclass(frozen=True)
class Scaling:
    """How the coordinate z = alpha x, in which a law is usually written, follows from sigma (any shape, >= 0)."""

    alpha: Callable[[Tensor], Tensor]
    start: Callable[[Tensor], Tensor]  # the deviation of x where z is said to be nothing but noise


PRESERVING = Scaling(alpha=lambda sigma: (1 + sigma**2).rsqrt(), start=lambda sigma: (1 + sigma**2).sqrt())
EXPLODING = Scaling(alpha=torch.ones_like, start=lambda sigma: sigma)
STRAIGHT = Scaling(alpha=lambda sigma: 1 / (1 + sigma), start=lambda sigma: 1 + sigma)

SCALINGS = {"vp": PRESERVING, "ve": EXPLODING, "flow": STRAIGHT, "edm": PRESERVING}


def step_deviations(alpha: Callable[[Tensor], Tensor], sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(beta-tilde, beta)^(1/2) of the reverse step from level s to r < s, in x at level r; any shape, float64.

    The two of Ho et al. 2020, section 3.2. beta-tilde is the posterior's own variance, right for data that are a
    point: r^2 (1 - r^2 / s^2). beta is that of the forward step from r to s, z_s = (a_s / a_r) z_r + noise, right
    for data that are N(0, I): in z = a x the noise has variance a_s^2 (s^2 - r^2), so in x, which is z_r / a_r,
    (s^2 - r^2) (a_s / a_r)^2; where variance is preserved, 1 - alpha_bar_s / alpha_bar_r over alpha_bar_r.
    """
    s, r = sigma, sigma_next
    return r * (1 - (r / s) ** 2).sqrt(), (s**2 - r**2).sqrt() * alpha(s) / alpha(r)


@dataclass(frozen=True, eq=False)
class Schedule:
    """T trained levels, and the law that they lie on.

    `sigmas`: (T,) float64 on the CPU, strictly increasing and finite.
    `pure_noise_end`: the last level stands for sigma = infinity (zero terminal SNR, flow), cut at `SIGMA_CUT`.
    `scaling`: alpha; variance-preserving unless another is given.
    `clock`: time in closed form. None for a chain, whose time is the index of a level: `t` is then in [0, T - 1],
        linear in log sigma between levels. With a clock `t` is 1000 tau, in (0, 1000] whatever T is (of edm
        ln(sigma) / 4, which may be negative), and the T levels are evenly spaced in it.
    `shift`: what grids and level draws multiply a flow's levels by; 1 for other laws.
    """

    sigmas: Tensor
    pure_noise_end: bool = False
    scaling: Scaling = PRESERVING
    clock: Clock | None = None
    shift: float = 1.0

    @property
    def steps(self) -> int:
        """T, the number of trained levels; in continuous time, of the levels in the table."""
        return len(self.sigmas)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The last level's sigma, always finite."""
        return float(self.sigmas[-1])

    @property
    def t_min(self) -> float:
        """The time of the first level: 0 for a chain."""
        return float(self.t(self.sigmas[0]))

    @property
    def t_max(self) -> float:
        """The time of the last level: T - 1 for a chain, 1000 for others but edm."""
        return float(self.t(self.sigmas[-1]))

    @property
    def is_flow(self) -> bool:
        """In continuous time from pure noise: rectified flow, whose shift moves the grids in t alone."""
        return self.pure_noise_end and not self.is_chain

    @property
    def is_chain(self) -> bool:
        """Its levels are steps of a chain, whose time is their index; otherwise time is continuous."""
        return self.clock is None

    @property
    def preserves_variance(self) -> bool:
        return self.scaling is PRESERVING

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) alpha_bar_t = 1 / (1 + sigma_t^2), decreasing. A law cut at `SIGMA_CUT` ends at 1e-12, not at 0.

        Where the law does not preserve variance, it is that of the chain with the same signal-to-noise ratios.
        """
        return 1 / (1 + self.sigmas**2)

    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor between the two coordinates, z = alpha x; any shape, sigma >= 0.

        It is also c_in, unless the parameterization has one of its own.
        """
        return self.scaling.alpha(sigma)

    def start_scale(self, sigma: Tensor) -> Tensor:
        """The deviation of x at pure noise, x = start_scale(sigma) n, for the grid's first sigma (any shape).

        Where z = alpha x ends in unit noise this is 1 / alpha: sqrt(1 + sigma^2) if variance is preserved, 1 + sigma
        on straight paths. Where it explodes, alpha is 1 and the noise is all there is: sigma.
        """
        return self.scaling.start(sigma)

    def shifted(self, sigma: Tensor) -> Tensor:
        """Levels (any shape) moved as the model's resolution asks (Esser et al. 2024, section 5.3.2)."""
        return (sigma * self.shift).clamp(max=self.sigma_max)

    def t(self, sigma: Tensor) -> Tensor:
        """The network's time of `sigma` (any shape), on sigma's device and in its dtype.

        Never rounded; levels outside the trained range get its ends.
        """
        level = sigma.detach().cpu().double()
        time = self._index(level) if self.clock is None else self.clock.time(self._trained(level))
        return time.to(sigma.dtype).to(sigma.device)

    def sigma(self, t: Tensor) -> Tensor:
        """The inverse of `t`: sigma of a time (any shape); a time outside the trained range gets its ends."""
        time = t.detach().cpu().double()
        if self.clock is None:
            level = self._at_index(time)
        else:
            level = self._trained(self.clock.level(time))
        return level.to(t.dtype if t.is_floating_point() else torch.float64).to(t.device)

    def _trained(self, level: Tensor) -> Tensor:
        return level.clamp(self.sigma_min, self.sigma_max)

    def _index(self, level: Tensor) -> Tensor:
        """A chain's time of float64 levels."""
        knots, level = self.sigmas.log(), level.log()
        right = torch.searchsorted(knots, level).clamp(1, self.steps - 1)
        fraction = (level - knots[right - 1]) / (knots[right] - knots[right - 1])
        return right - 1 + fraction.clamp(0, 1)

    def _at_index(self, time: Tensor) -> Tensor:
        time = time.clamp(0, self.steps - 1)
        left = time.floor().long().clamp(max=self.steps - 2)
        knots = self.sigmas.log()
        return torch.lerp(knots[left], knots[left + 1], time - left).exp()


def linear_betas(config: ScheduleConfig) -> Tensor:
    """(T,) beta linear in t (Ho et al. 2020, section 4)."""
    return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)


def scaled_linear_betas(config: ScheduleConfig) -> Tensor:
    """(T,) sqrt(beta) linear in t (Rombach et al. 2022, called "linear" in their code)."""
    start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    return torch.linspace(start, end, config.steps, dtype=torch.float64) ** 2


def cosine_betas(config: ScheduleConfig) -> Tensor:
    """(T,) alpha_bar = cos^2 of t (Nichol & Dhariwal 2021, equation 17, s = 0.008)."""
    return _betas_of(torch.cos((_unit_times(config) + 0.008) / 1.008 * math.pi / 2) ** 2)


def sigmoid_betas(config: ScheduleConfig) -> Tensor:
    """(T,) alpha_bar falls as a logistic function on [-3, 3], moved and scaled to end in 1 and 0.

    Jabri et al. 2022, "Scalable adaptive computation for iterative generation", with the ends and the temperature 1 of
    Chen 2023, "On the importance of noise scheduling", algorithm 1.
    """
    start, end = -3.0, 3.0
    first, last = (1 / (1 + math.exp(-value)) for value in (start, end))
    return _betas_of((last - torch.sigmoid(start + (end - start) * _unit_times(config))) / (last - first))


def _unit_times(config: ScheduleConfig) -> Tensor:
    return torch.arange(config.steps + 1, dtype=torch.float64) / config.steps


def _betas_of(alpha_bar: Tensor) -> Tensor:
    """(T,) betas of alpha_bar (T + 1,) at t = 0, 1 / T .. 1, cut at `MAX_BETA`."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


BETAS: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


OWN = {  # which kinds read what of a schedule's settings
    ("linear", "scaled_linear"): ("beta_start", "beta_end"),
    ("vp",): ("beta_min", "beta_max", "time_min"),
    ("ve", "edm"): ("sigma_min", "sigma_max"),
    ("flow",): ("shift",),
}


def check_used(config: ScheduleConfig, among: Collection[str] | None = None) -> None:
    """Raise UserError for a setting (of those in `among`, where that is given) that was changed and that a schedule of
    this kind does not read."""
    usual = ScheduleConfig()
    for kinds, names in OWN.items():
        for name in names if config.kind not in kinds else ():
            if getattr(config, name) != getattr(usual, name) and (among is None or name in among):
                raise UserError(
                    f"schedule.{name} is {getattr(config, name):g}, and schedule.kind={config.kind} has no use for it, "
                    f"but {' and '.join(kinds)}; leave it out, or set the kind"
                )


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that `config` describes. Raises UserError for an unknown kind and for numbers that make no law."""
    if config.kind not in BETAS and config.kind not in CLOCKS:
        raise UserError(f"schedule.kind is '{config.kind}'; choose one of {', '.join([*BETAS, *CLOCKS])}")
    if config.steps < 2:
        raise UserError(f"schedule.steps is {config.steps}; a noise schedule needs at least 2 levels")
    schedule = _chain(config) if config.kind in BETAS else _continuous(config)
    if not bool(schedule.sigmas.isfinite().all() and (schedule.sigmas.diff() > 0).all()):
        raise UserError(
            f"the noise schedule reaches sigma = {float(schedule.sigmas[-2]):.3g} before its last level and cannot be "
            "resolved; use fewer steps or smaller betas"
        )
    return schedule


def _chain(config: ScheduleConfig) -> Schedule:
    if config.kind in ("linear", "scaled_linear") and not 0 < config.beta_start <= config.beta_end < 1:
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
    return Schedule(sigmas, pure_noise_end=config.zero_terminal_snr)


def _continuous(config: ScheduleConfig) -> Schedule:
    if config.zero_terminal_snr:
        raise UserError(
            f"schedule.zero_terminal_snr rescales a chain's table, and {config.kind} has none; set it to false, or "
            f"choose one of {', '.join(BETAS)}"
        )
    clock, times = CLOCKS[config.kind](config)
    sigmas = clock.sigma(times).clamp(max=SIGMA_CUT)
    flow = config.kind == "flow"
    return Schedule(sigmas, flow, SCALINGS[config.kind], clock, config.shift if flow else 1.0)


def zero_terminal_snr(alphas_bar: Tensor) -> Tensor:
    """(T,) -> (T,): sqrt(alpha_bar) shifted so that it ends at 0 and scaled so that it starts where it did.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1.
    """
    root = alphas_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
