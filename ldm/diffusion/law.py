"""Law: what a network was trained under, as one value. Each formula that needs it has its one home here.

The schedule gives the network's inputs, c_in = alpha(sigma) and t(sigma), unless the parameterization has its own; the
parameterization turns its output into x0. A network with a learned variance has twice as many channels: F and v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.continuous import TIME_UNIT
from ldm.diffusion.parameterization import Parameterization, check, make_parameterization, per_picture
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.model_config import ScheduleConfig


@dataclass(frozen=True, eq=False)
class Law:
    """The noise (schedule), what the network says of it (parameterization), and whether it says the steps' variance."""

    schedule: Schedule
    parameterization: Parameterization
    learned_variance: bool = False

    def input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x_in, t) for the network, float32: x_in = c_in(sigma) x (B, C, h, w), t (B,), of sigma () or (B,).

        Outside the trained range the time is that of its nearer end.
        """
        schedule, parameterization = self.schedule, self.parameterization
        if parameterization.c_noise is None:
            t = schedule.t(sigma)
        else:
            level = sigma.detach().cpu().double().clamp(schedule.sigma_min, schedule.sigma_max)
            t = TIME_UNIT * parameterization.c_noise(level)
        c_in = (parameterization.c_in or schedule.alpha)(sigma)
        return (per_picture(c_in, x) * x).to(torch.float32), t.to(torch.float32).to(x.device).expand(len(x))

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D of a network's `output` (..., B, C or 2 C, h, w) at `x` (B, C, h, w): of its first C channels."""
        return self.parameterization.denoised(output.narrow(1 - x.ndim, 0, x.shape[1]), x, sigma)

    def target(self, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
        """What F should be (B, C, h, w), of data `x0` and noise `n` (B, C, h, w) at `sigma` () or (B,)."""
        return self.parameterization.target(x0, n, sigma)


def make_law(
    schedule: ScheduleConfig, parameterization: str, sigma_data: float = 1.0, learned_variance: bool = False
) -> Law:
    """The law that the settings describe. Raises UserError for settings that make none, or none that makes sense."""
    form = make_parameterization(parameterization, sigma_data)
    # EDM's own clock is ln(sigma) / 4 already; beside others, the networks trained here are told a thousand times that.
    form = replace(form, c_noise=None) if schedule.kind == "edm" else form
    made = Law(make_schedule(schedule), form, learned_variance)
    check(made.schedule, made.parameterization, learned_variance)
    return made
