"""What a network is trained to do: an objective is a value, a function of networks, data and the step's draws.

Today's regresses the network's target (Algorithm 1 of Ho et al. 2020 in the coordinates of ldm/diffusion). One that
learns from a teacher's steps, or from its own average at the next lower level, is another function of the same type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.diffusion import Denoiser, Law, check_loss, diffusion_loss, draw_levels
from ldm.diffusion.parameterization import per_picture
from ldm.model_config import DiffusionLossConfig
from ldm.training.draws import Draws
from ldm.training.meters import EACH_SIGMA

Call = Callable[[Tensor, Tensor, Condition], Tensor]
"""A `Network` as a step calls it: x_in, t and the conditions. `diffusion.precondition` makes a denoiser of one."""

Logs = dict[str, Tensor]


@dataclass(frozen=True)
class Nets:
    """Whom an objective may ask; a gradient goes to the student alone."""

    student: Call
    average: Call | None = None  # the student with its averaged weights, lent by the loop; None where there are none
    teacher: Denoiser | None = None  # bound to what is told of the batch, guided, with a law of its own


Objective = Callable[[Nets, Tensor, Condition, Draws], tuple[Tensor, Logs]]
"""Nets, x0 (B, C, h, w), what is told of it, draws -> the pictures' losses (B,), and what else to log of them."""


def regress(law: Law, config: DiffusionLossConfig) -> Objective:
    """w(sigma) |D - x0|^2 at drawn levels. Raises UserError for a loss that makes no sense under `law`."""
    check_loss(config, law.learned_variance)

    def objective(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Logs]:
        uniform = draws.stratified("level") if config.stratified else draws.uniform("level")
        sigma = draw_levels(config, law.schedule, uniform)
        n, seen = training_noise(config, draws, x0.shape[1:])
        output = output_of(nets.student, law, x0 + per_picture(sigma, x0) * seen, sigma, told)
        return diffusion_loss(output, x0, n, sigma, config, law), {EACH_SIGMA: sigma}

    return objective


def output_of(network: Call, law: Law, x: Tensor, sigma: Tensor, told: Condition) -> Tensor:
    """What `network` itself puts out for x (B, C, h, w) at sigma (B,), before it is made a denoiser."""
    x_in, t = law.input(x, sigma)
    return network(x_in.contiguous(memory_format=torch.channels_last), t, told)


def training_noise(config: DiffusionLossConfig, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The noise that the target is made of, and that which the network sees: n and n + g n', both (B, *shape).

    Both have the offset, one number for each channel of each sample, so that the network learns to move a picture's
    mean (Guttenberg 2023). g is the input perturbation: in sampling x comes from the network's own errors, and a
    network that was trained on slightly more noise than its target says forgives them (Ning et al. 2023, algorithm 1).
    """
    n = draws.normal("noise", shape)
    if config.offset_noise:
        n = n + config.offset_noise * draws.normal("offset noise", (shape[0], 1, 1))
    if not config.input_perturbation:
        return n, n
    return n, n + config.input_perturbation * draws.normal("input perturbation", shape)


def relative_error(output: Tensor, x0: Tensor, n: Tensor, sigma: Tensor, law: Law) -> Tensor:
    """(1 + 1 / sigma^2) |D - x0|^2 (B,), mean over C, h, w: the share of the variance of N(0, I) left unexplained.

    Given x, an x0 ~ N(0, I) has the variance sigma^2 / (1 + sigma^2). `output` is the network's on x0 + sigma n.
    """
    found = law.denoised(output, x0 + per_picture(sigma, x0) * n, sigma)
    return (1 + sigma.to(x0) ** -2) * (found - x0).square().flatten(1).mean(dim=1)
