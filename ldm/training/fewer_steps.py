"""Objectives that teach a network to draw in fewer steps; the mathematics is in ldm/diffusion/fewer_steps.py.

halve          progressive distillation: a student of N steps learns where its teacher's 2 N lead, with guidance
               or without (Salimans and Ho 2022; with guidance Meng et al. 2023, whose first stage merges one step)
consistency    consistency distillation: at each level the student says what its own average says one step of the
               teacher further down (Song et al. 2023; guided and on latents Luo et al. 2023)
consistent     the same without a teacher: the step is along x0 + sigma n (Song and Dhariwal 2023)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.config import Consistency, ConsistencyTraining, DiffusionTraining, DrawingConfig, Halve, Regress
from ldm.diffusion import Denoiser, Law, bind, weight
from ldm.diffusion.fewer_steps import (
    ddim_step,
    heun_step,
    huber_width,
    improved_index,
    improved_levels,
    merged,
    pseudo_huber,
)
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.guidance import cfg
from ldm.model_config import DiffusionLossConfig
from ldm.networks import AnyNetwork
from ldm.sampling import make_grid
from ldm.training.draws import Draws
from ldm.training.meters import EACH_SIGMA
from ldm.training.objectives import Call, Logs, Nets, Objective, output_of, regress
from ldm.unet.unet import UNet

SOLVERS = {"ddim": ddim_step, "heun": heun_step}
TOLD_WIDTH = 256  # sinusoids that a student is told its guidance scale by, as published ones are

Teacher = Callable[[Condition, Condition], Denoiser]
"""(what is told of a batch, the same without text and label) -> the teacher's denoiser of it."""


def make_objective(
    config: DiffusionTraining, law: Law, loss: DiffusionLossConfig, network: AnyNetwork
) -> tuple[Objective, Teacher | None]:
    """What the settings ask for, and the teacher: the `network` of init as it is now, before anything is trained.

    Raises UserError for what makes no sense.
    """
    asked = config.objective
    if isinstance(asked, Regress):
        return regress(law, loss), None
    if law.learned_variance:
        raise UserError(f"objective.kind={asked.kind} teaches no variance; set learned_variance=false")
    if isinstance(asked, ConsistencyTraining):
        return _consistency_training(asked, law, config.loop.steps), None
    if not config.init:
        raise UserError(f"objective.kind={asked.kind} has the model of init as its teacher; set init=PATH")
    teacher = partial(_teach, copy.deepcopy(network).requires_grad_(False).eval(), law, asked.cfg)
    return _halve(asked, law, loss) if isinstance(asked, Halve) else _consistency(asked, law), teacher


def _teach(network: AnyNetwork, law: Law, scale: float, told: Condition, untold: Condition) -> Denoiser:
    """The guided denoiser of a batch's conditions, at the scales that they say, where they say any."""
    if is_told(network):  # it was taught guidance itself
        return cfg(bind(network, [told], law), 1)
    each = scale if told.guidance is None else told.guidance
    return cfg(bind(network, [dataclasses.replace(some, guidance=None) for some in (told, untold)], law), each)


def is_told(network: AnyNetwork) -> bool:
    """Whether a network is told its guidance scale."""
    return isinstance(network, UNet) and network.guidance_embedding is not None


def student_of(network: AnyNetwork, config: DiffusionTraining) -> AnyNetwork:
    """What is to be trained, which begins as `network`: that itself, or the same told its guidance scale.

    Raises UserError for scales that the network cannot be told, and for a network that waits to be told some.
    """
    asked = getattr(config.objective, "cfg_range", None)
    if asked is None:
        if is_told(network):
            raise UserError(
                f"the model {config.init} is told its guidance scale; say which it is to be trained at, as "
                "objective.cfg_range=[3,13] of objective.kind=consistency or halve"
            )
        return network
    if not -math.inf < asked[0] <= asked[1] < math.inf:
        raise UserError(f"objective.cfg_range is {list(asked)}; give the lowest and the highest scale, as [3, 13]")
    if is_told(network):
        return network
    if not isinstance(network, UNet):
        raise UserError("objective.cfg_range is told to a U-Net, and this is another network; set objective.cfg")
    if config.lora.rank:
        raise UserError(
            "objective.cfg_range needs a layer that a LoRA has no place for; set objective.cfg in its place, or leave "
            "out lora.rank"
        )
    student = UNet(dataclasses.replace(network.config, guidance_width=TOLD_WIDTH))
    student.load_state_dict(network.state_dict(), strict=False)  # the layer that is new begins at 0
    return student.to(network.conv_in.weight.device).train(network.training)


def drawn_by(config: DiffusionTraining, own: DrawingConfig) -> DrawingConfig:
    """How a network trained so is meant to be drawn; `own` is how the model of init is, which a LoRA of an ordinary
    training leaves. A student has its teacher's guidance at 1, or is told it."""
    asked = config.objective
    if isinstance(asked, Regress):
        return own if config.lora.rank else DrawingConfig()
    scale, spacing = 1.0, asked.spacing
    if isinstance(asked, Halve | Consistency) and asked.cfg_range is not None:
        low, high = asked.cfg_range
        scale = min(max(config.sample.cfg, low), high)
    if isinstance(asked, Halve) and asked.merged == 1 and asked.steps > DrawingConfig.steps:
        return DrawingConfig(scale)  # its steps are its teacher's, at so many levels that any sampler finds some
    if isinstance(asked, Halve):
        return DrawingConfig(scale, asked.steps, "ddim", spacing)
    published = isinstance(asked, Consistency) and (asked.levels, spacing) == (50, "trailing")
    return DrawingConfig(scale, asked.steps, "lcm", "lcm" if published else spacing)


def _halve(config: Halve, law: Law, loss: DiffusionLossConfig) -> Objective:
    count = config.merged
    grid = make_grid(law.schedule, count * config.steps, config.spacing)

    def objective(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Logs]:
        assert nets.teacher is not None
        step = (draws.uniform("level") * config.steps).long()
        s, *below = (grid[count * step + k] for k in range(count + 1))  # on the CPU: not each device has float64
        x = _noised(x0, s, draws)
        with torch.no_grad():
            target = merged(nets.teacher, x, [s, *below])
        error = _denoiser(nets.student, law, told)(x, s) - target
        factor = weight(loss, law, s).to(x0)
        return factor * error.square().flatten(1).mean(1), {EACH_SIGMA: s}

    return objective


def _consistency(config: Consistency, law: Law) -> Objective:
    _check_boundary(law)
    grid, advance = make_grid(law.schedule, config.levels, config.spacing), SOLVERS[config.solver]

    def objective(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Logs]:
        assert nets.teacher is not None
        step = (draws.uniform("level") * config.levels).long()
        s, r = grid[step], grid[(step + config.skip).clamp(max=config.levels)]
        x = _noised(x0, s, draws)
        with torch.no_grad():
            below = advance(nets.teacher, x, s, r)
            target = _end(nets.average or nets.student, law, told, below, r)
        error = _denoiser(nets.student, law, told)(x, s) - target
        return pseudo_huber(error, huber_width(x0[0].numel())), {EACH_SIGMA: s}

    return objective


def _consistency_training(config: ConsistencyTraining, law: Law, steps: int) -> Objective:
    _check_boundary(law)

    def objective(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Logs]:
        done = draws.address[1]
        progress = done / steps if isinstance(done, int) else 1.0
        levels = improved_levels(progress, config.first_levels, config.last_levels)
        grid = make_grid(law.schedule, levels, config.spacing)
        step = improved_index(draws.uniform("level"), grid)
        s, r = (grid[step + k] for k in range(2))
        n = draws.normal("noise", x0.shape[1:])  # the same at both levels
        x, below = (x0 + per_picture(each, x0) * n for each in (s, r))
        with torch.no_grad():
            target = _end(nets.student, law, told, below, r)
        error = _denoiser(nets.student, law, told)(x, s) - target
        return pseudo_huber(error, huber_width(x0[0].numel())) / (s - r).to(x0), {EACH_SIGMA: s}

    return objective


def _noised(x0: Tensor, sigma: Tensor, draws: Draws) -> Tensor:
    return x0 + per_picture(sigma, x0) * draws.normal("noise", x0.shape[1:])


def _denoiser(network: Call, law: Law, told: Condition) -> Denoiser:
    return lambda x, sigma: law.denoised(output_of(network, law, x, sigma, told), x, sigma)


def _end(network: Call, law: Law, told: Condition, x: Tensor, sigma: Tensor) -> Tensor:
    """What a consistency function says of x at sigma (B,): of sigma 0, x itself."""
    low = sigma.clamp(min=float(law.schedule.sigma_min))
    return torch.where(per_picture(sigma, x) > 0, _denoiser(network, law, told)(x, low), x)


def _check_boundary(law: Law) -> None:
    if law.parameterization.name == "x0":
        raise UserError(
            "a network that predicts x0 is no consistency function, which leaves x as it is at sigma 0; use a model "
            "with another parameterization (v, eps, flow, score, edm)"
        )
