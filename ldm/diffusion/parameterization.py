"""What a network predicts. With F its output, every network is the denoiser

    D(x, sigma) = c_skip(sigma) x + c_out(sigma) F,        x = x0 + sigma n,

so a parameterization is two functions of sigma, and the target F* is what makes D = x0:

    F* = (x0 - c_skip x) / c_out = ((1 - c_skip) x0 - c_skip sigma n) / c_out.

In the chain's coordinates z = alpha x, with a = alpha and s = sigma alpha (so a^2 + s^2 = 1): eps is n, and v is
a n - s x0 (Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError


@dataclass(frozen=True)
class Parameterization:
    """`c_skip` and `c_out` map sigma (any shape, > 0) to factors of that shape."""

    name: str
    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]

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


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "eps": Parameterization("eps", torch.ones_like, lambda sigma: -sigma),
    "x0": Parameterization("x0", torch.zeros_like, torch.ones_like),
    "v": Parameterization("v", lambda sigma: 1 / (1 + sigma**2), lambda sigma: -sigma * (1 + sigma**2).rsqrt()),
}


def make_parameterization(name: str) -> Parameterization:
    """The parameterization called `name`; raises UserError for one that is not in `PARAMETERIZATIONS`."""
    if name not in PARAMETERIZATIONS:
        raise UserError(f"parameterization is '{name}'; choose one of {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[name]


def check(schedule: Schedule, parameterization: Parameterization) -> None:
    """Raise UserError if the pair makes no sense: eps on a schedule that ends in pure noise."""
    if schedule.pure_noise_end and parameterization.name == "eps":
        raise UserError(
            "parameterization eps cannot go with zero_terminal_snr: at the last level the network's input is the noise "
            "itself, so predicting it says nothing about the picture; choose v or x0"
        )


def per_picture(value: Tensor, x: Tensor) -> Tensor:
    """`value`, () or (B,), on x's device and in its dtype, with axes added so that it multiplies x (B, ...)."""
    value = value.to(x.dtype).to(x.device)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
