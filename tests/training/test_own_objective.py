"""An objective that a user brings: the trainer takes it in the place of the settings' one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.config import DiffusionTraining
from ldm.model import Model
from ldm.training.draws import Draws
from ldm.training.objectives import Nets, Objective
from ldm.training.stage_two import diffusion_stage

from .test_stage_two import pixels, tower  # noqa: F401 (fixtures)
from .toys import CPU, log_of, run


def test_the_trainer_takes_an_objective_of_ones_own(pixels: DiffusionTraining, tmp_path: Path) -> None:  # noqa: F811
    """It is made of the model, trains in the place of the settings' one, and is what the validation tells."""
    seen: list[tuple[int, ...]] = []

    def own(model: Model) -> Objective:
        def brightness(nets: Nets, x0: Tensor, told: Condition, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(tuple(x0.shape))
            said = nets.student(torch.zeros_like(x0), torch.zeros(len(x0)), told)
            return (said - 3.0).square().flatten(1).mean(1), {}

        assert model.law.parameterization.name == "v"
        return brightness

    config = replace(pixels, loop=replace(pixels.loop, steps=30, save_every=30, log_every=15, validate_every=15))
    stage = diffusion_stage(config, 0, 1, CPU, own=own)
    run(stage, config.loop, tmp_path, config)
    lines = log_of(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    told = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert losses[0] > 8 > 2 * losses[-1] and told[-1] < told[0] < 9
    assert set(seen) <= {(count, 3, 8, 8) for count in range(1, 9)}
