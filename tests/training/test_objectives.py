"""An objective is a function of networks and draws: what it is lent, and what it must not do to a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.config import DiffusionLossConfig, ScheduleConfig
from ldm.diffusion import make_law, precondition
from ldm.training.draws import Draws
from ldm.training.members import Members
from ldm.training.objectives import Call, Logs, Nets, regress
from ldm.training.processes import make_accelerator
from ldm.training.stage_two import diffusion_stage

from .test_combinations import PLAIN, TRAININGS
from .toys import CPU, LOOP, run

KEYS = [f"sample{i}" for i in range(5)]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_waits_for_no_device(name: str) -> None:
    """On the meta device, where nothing can be read back, the whole loss is computed: levels are made on the CPU."""
    kind, target, loss = TRAININGS[name]
    schedule = ScheduleConfig(zero_terminal_snr=True) if kind == "zero" else ScheduleConfig(kind=kind)
    law = make_law(schedule, target, 0.5, name.endswith("learned"))
    draws, told = Draws(0, 0, KEYS, "meta"), Condition(torch.zeros(5, 2, 4, device="meta"))
    x0 = torch.zeros(5, 3, 8, 8, device="meta")

    def network(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        return torch.cat([x, x], dim=1) if law.learned_variance else x

    each, logs = regress(law, DiffusionLossConfig(**loss))(Nets(network), x0, told, draws)  # type: ignore[arg-type]
    assert each.device.type == "meta" and each.shape == (5,)
    assert logs["each/sigma"].device.type == "cpu"
    assert Draws(0, 0, KEYS, "meta").uniform("level", (3,)).device.type == "cpu"


def test_an_objective_that_learns_from_its_own_average(tmp_path: Path) -> None:
    """The loop lends it: at first the network itself, then what the average's weights say, without a gradient."""
    config = replace(PLAIN, loop=replace(LOOP, steps=3))
    stage = diffusion_stage(config, 0, 1, CPU)
    law, seen = stage.model.law, []

    def consistent(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, Logs]:
        """D at a level is D of the average at half of it."""
        assert nets.average is not None
        sigma, n = torch.full((len(x0),), 2.0, dtype=torch.float64), draws.normal("noise", x0.shape[1:])

        def denoised(network: Call, level: Tensor) -> Tensor:
            return precondition(lambda x, t: network(x, t, told), law)(x0 + level.float().view(-1, 1, 1, 1) * n, level)

        target, found = denoised(nets.average, sigma / 2), denoised(nets.student, sigma)
        same = bool((denoised(nets.average, sigma) == found).all())
        seen.append((same, target.requires_grad, found.requires_grad))
        return (found - target).square().flatten(1).mean(dim=1), {}

    stage.objective = consistent
    run(stage, config.loop, tmp_path, config)
    assert seen == [(True, False, True), (False, False, True), (False, False, True)]


def test_an_average_that_is_not_there_is_not_lent(tmp_path: Path) -> None:
    for loop, lent in ((LOOP, True), (replace(LOOP, ema=0.0), False), (replace(LOOP, ema_on_cpu=True), False)):
        stage = diffusion_stage(replace(PLAIN, loop=loop), 0, 1, CPU)
        Members(stage.players, loop, make_accelerator(loop, tmp_path))
        assert (stage.players["unet"].average is not None) == lent
