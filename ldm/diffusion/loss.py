"""The loss w(sigma) |D - x0|^2, computed on the network's own output as w c_out^2 |F - F*|^2.

A weight is one function of sigma whatever the parameterization; SNR is 1 / sigma^2 and d is sigma_data:

    uniform   1 / c_out^2       plain |F - F*|^2: eps 1 / sigma^2, v 1 + 1 / sigma^2, flow (1 + 1 / sigma)^2, x0 1
    snr       1 / sigma^2       equal to uniform eps for every parameterization (DDPM's L_simple); on a score-network's
                                own output it is sigma^2 (Song & Ermon 2019, section 4.2)
    min_snr   min(1 / sigma^2, gamma)     (Hang et al. 2023); on F this is min(SNR, gamma) / SNR for eps and
                                          min(SNR, gamma) / (SNR + 1) for v
    truncated max(1 / sigma^2, 1)     (Salimans & Ho 2022, section 4): a level of pure noise counts too
    edm       (sigma^2 + d^2) / (sigma d)^2     (Karras et al. 2022, table 1); uniform edm, and with d = 1 uniform v
    elbo      the variational bound: (SNR_before - SNR) / 2 for each step of a chain (see `elbo`)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm import ranges
from ldm.diffusion.law import Law
from ldm.diffusion.learned_variance import split, variance_bound
from ldm.diffusion.levels import LEVELS
from ldm.diffusion.parameterization import per_picture
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.model_config import DiffusionLossConfig


def elbo(schedule: Schedule, sigma: Tensor) -> Tensor:
    """The weight with which the mean over uniform levels is L_vlb (Ho et al. 2020), nats a value, constants aside.

    A chain: T KL(q(x_r | x_s, x0) || p(x_r | x_s)) = T (1 / r^2 - 1 / s^2) / 2 |D - x0|^2 with the posterior's variance
    in both, whatever the law (Kingma et al. 2021, section 4). The first level has no r, but a Gaussian decoder around
    D of variance beta_1 = s^2 / (1 + s^2): T (1 + 1 / s^2) / 2.
    Continuous time, T -> infinity: |d SNR / dt| / 2 times the range of t (their section 5). On ve it is snr but for a
    factor.
    """
    snr = sigma**-2
    if schedule.clock is not None:
        return (schedule.t_max - schedule.t_min) / schedule.clock.told[1] * snr * schedule.clock.slope(sigma)
    index = schedule.t(sigma).round().long()
    before = torch.where(index > 0, schedule.sigmas[(index - 1).clamp(min=0)] ** -2, 1 + 2 * snr)
    return schedule.steps / 2 * (before - snr)


WEIGHTS: dict[str, Callable[[DiffusionLossConfig, Law, Tensor], Tensor]] = {
    "uniform": lambda config, law, sigma: law.parameterization.c_out(sigma) ** -2,
    "snr": lambda config, law, sigma: sigma**-2,
    "min_snr": lambda config, law, sigma: (sigma**-2).clamp(max=config.min_snr_gamma),
    "truncated": lambda config, law, sigma: (sigma**-2).clamp(min=1),
    "edm": lambda config, law, sigma: sigma**-2 + law.parameterization.sigma_data**-2,
    "elbo": lambda config, law, sigma: elbo(law.schedule, sigma),
}


def weight(config: DiffusionLossConfig, law: Law, sigma: Tensor) -> Tensor:
    """w(sigma), the weight of |D - x0|^2; any shape, sigma > 0. Raises UserError for an unknown `config.weight`."""
    if config.weight not in WEIGHTS:
        raise UserError(f"loss.weight is '{config.weight}'; choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[config.weight](config, law, sigma)


def check_loss(config: DiffusionLossConfig, learned_variance: bool = False) -> None:
    """Raise UserError, with the reason, if the settings of the loss make no sense."""
    ranges.check(config, prefix="loss.")
    for name, known in (("weight", WEIGHTS), ("levels", LEVELS)):
        if getattr(config, name) not in known:
            raise UserError(f"loss.{name} is '{getattr(config, name)}'; choose one of {', '.join(known)}")
    if config.levels != "uniform" and (learned_variance or config.weight == "elbo"):
        what = "learned_variance" if learned_variance else "loss.weight elbo"
        raise UserError(
            f"{what} trains a bound that is a sum over all levels, each counted once, but loss.levels is "
            f"'{config.levels}'; set loss.levels=uniform"
        )
    if config.levels == "uniform" and (config.level_mean, config.level_std) != (None, None):
        raise UserError(
            "loss.level_mean and loss.level_std belong to a normal draw, and loss.levels is 'uniform'; leave them out, "
            "or set loss.levels=lognormal or logit_normal"
        )


def diffusion_loss(
    output: Tensor, x0: Tensor, n: Tensor, sigma: Tensor, config: DiffusionLossConfig, law: Law
) -> Tensor:
    """The loss (B,) of the network's `output` for data `x0` and noise `n` (B, C, h, w) at `sigma` (B,).

    It is the mean over C, h, w, in x0's dtype. `output` is F (B, C, h, w), the network on `law.input(x0 + sigma n,
    sigma)`, or F and v (B, 2 C, h, w) if the variance is learned; the loss is then the hybrid of Nichol & Dhariwal
    2021, equation 16: this one, and `config.variance_bound` times the bound that only v is trained by.
    """
    level = sigma.cpu().double()
    c_out = law.parameterization.c_out(level)
    factor = weight(config, law, level) * c_out**2
    first, v = split(output.to(x0.dtype), x0.shape[1])
    error = first - law.target(x0, n, sigma)
    loss = per_picture(factor, x0).flatten() * error.square().flatten(1).mean(dim=1)
    if v is None:
        return loss
    bound = variance_bound(v, per_picture(c_out, x0) * error.detach(), sigma, law.schedule)
    return loss + config.variance_bound * bound
