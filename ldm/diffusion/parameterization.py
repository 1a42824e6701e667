"""What a network predicts. With F its output, every network is the denoiser

    D(x, sigma) = c_skip(sigma) x + c_out(sigma) F,        x = x0 + sigma n,

so a parameterization is two functions of sigma, and the target F* is what makes D = x0:

    F* = (x0 - c_skip x) / c_out = ((1 - c_skip) x0 - c_skip sigma n) / c_out.

    eps     n                       Ho et al. 2020, equation 14
    x0      x0
    v       a n - s x0              Salimans & Ho 2022, appendix D, with a = 1 / sqrt(1 + sigma^2) and s = sigma a
    flow    n - x0                  the velocity of (1 - tau) x0 + tau n (Liu et al. 2023)
    score   -n / sigma              grad ln p(x; sigma), in x; the score in z = alpha x is that divided by alpha
    edm     sets c_in and c_noise too, for data of deviation sigma_data (Karras et al. 2022, table 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError


@dataclass(frozen=True)
class Parameterization:
    """Functions of sigma (any shape, > 0), each with a value of that shape; `sigma_data` is the data's deviation.

    Without a `c_in` the network is given z = alpha x, and without a `c_noise` the time t, both the schedule's.
    `c_noise` is on the scale of the papers; as a schedule's time it reaches the network times `TIME_UNIT`.
    """

    name: str
    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]
    c_in: Callable[[Tensor], Tensor] | None = None
    c_noise: Callable[[Tensor], Tensor] | None = None
    sigma_data: float = 1.0

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D of the network's `output` (..., B, C, h, w) at `x` (B, C, h, w), `sigma` () or (B,); in x's dtype."""
        level = sigma.cpu().double()
        return per_picture(self.c_skip(level), x) * x + per_picture(self.c_out(level), x) * output.to(x.dtype)

    def target(self, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
        """F* (B, C, h, w) of data `x0` and noise `n` (B, C, h, w) at `sigma` () or (B,); in x0's dtype.

        The factors of x0 and n are formed before data comes in: x0 - c_skip x would cancel at small sigma.
        """
        level = sigma.cpu().double()
        c_skip, c_out = self.c_skip(level), self.c_out(level)
        return per_picture((1 - c_skip) / c_out, x0) * x0 - per_picture(c_skip * level / c_out, x0) * n


def edm(sigma_data: float) -> Parameterization:
    """Input and target of unit variance at every level, and the least gain of the network's errors (their appendix B).

    With sigma_data = 1 it is -v: the same denoiser up to the sign of F, told another time.
    """
    variance = sigma_data**2
    return Parameterization(
        "edm",
        c_skip=lambda sigma: variance / (sigma**2 + variance),
        c_out=lambda sigma: sigma * sigma_data * (sigma**2 + variance).rsqrt(),
        c_in=lambda sigma: (sigma**2 + variance).rsqrt(),
        c_noise=lambda sigma: sigma.log() / 4,
        sigma_data=sigma_data,
    )


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": Parameterization("eps", torch.ones_like, lambda sigma: -sigma),
    "x0": Parameterization("x0", torch.zeros_like, torch.ones_like),
    "v": Parameterization("v", lambda sigma: 1 / (1 + sigma**2), lambda sigma: -sigma * (1 + sigma**2).rsqrt()),
    "flow": Parameterization("flow", lambda sigma: 1 / (1 + sigma), lambda sigma: -sigma / (1 + sigma)),
    "score": Parameterization("score", torch.ones_like, lambda sigma: sigma**2),
    "edm": edm(1.0),
}


def make_parameterization(name: str, sigma_data: float = 1.0) -> Parameterization:
    """The parameterization called `name`, for data of that deviation.

    Raises UserError for a name that is not in `PARAMETERIZATIONS` and for an invalid deviation.
    """
    if name not in PARAMETERIZATIONS:
        raise UserError(f"parameterization is '{name}'; choose one of {', '.join(PARAMETERIZATIONS)}")
    if not 0 < sigma_data < math.inf:
        raise UserError(f"sigma_data is {sigma_data:g}; give the deviation of the latents, 1 if they are scaled")
    return edm(sigma_data) if name == "edm" else replace(PARAMETERIZATIONS[name], sigma_data=sigma_data)


def check(schedule: Schedule, parameterization: Parameterization, learned_variance: bool = False) -> None:
    """Raise UserError, with the reason, if the combination makes no sense."""
    if schedule.pure_noise_end and parameterization.name in ("eps", "score"):
        raise UserError(
            f"parameterization {parameterization.name} cannot go with a schedule that ends in pure noise (flow, "
            "zero_terminal_snr): at the last level the network's input is the noise itself, so predicting it says "
            "nothing about the picture; choose v, x0, flow or edm"
        )
    if learned_variance and not (schedule.is_chain and schedule.preserves_variance):
        raise UserError(
            "learned_variance interpolates the two variances of a chain's reverse step, which laws in continuous time "
            "do not have; choose schedule.kind linear, scaled_linear, cosine or sigmoid, or set learned_variance=false"
        )


def per_picture(value: Tensor, x: Tensor) -> Tensor:
    """`value`, () or (B,), on x's device and in its dtype, with axes added so that it multiplies x (B, ...)."""
    value = value.to(x.dtype).to(x.device)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
