"""The level draws are the inverse distribution functions of the uniforms they are given."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from ldm.config import DiffusionLossConfig, ScheduleConfig
from ldm.diffusion import draw_levels, make_schedule
from ldm.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig())


def test_uniform_draws_each_trained_level_equally() -> None:
    uniform = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    levels = draw_levels(DiffusionLossConfig(), SCHEDULE, uniform)
    assert levels.dtype == torch.float64
    torch.testing.assert_close(levels, SCHEDULE.sigmas.repeat_interleave(5), rtol=0, atol=0)


def test_lognormal_has_the_quantiles_of_its_law_inside_the_range() -> None:
    config = DiffusionLossConfig(levels="lognormal", level_mean=-0.5, level_std=0.9)
    quantiles = [0.05, 0.3, 0.5, 0.8, 0.97]
    levels = draw_levels(config, SCHEDULE, torch.tensor(quantiles, dtype=torch.float64))
    expected = [math.exp(NormalDist(-0.5, 0.9).inv_cdf(q)) for q in quantiles]
    assert levels.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("levels", ["uniform", "lognormal"])
def test_every_uniform_gives_a_trained_level(levels: str) -> None:
    config = DiffusionLossConfig(levels=levels, level_std=5.0)
    ends = torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-24])
    drawn = draw_levels(config, SCHEDULE, ends)
    assert bool(((drawn >= SCHEDULE.sigma_min) & (drawn <= SCHEDULE.sigma_max)).all())
    assert drawn[0] == SCHEDULE.sigma_min and drawn[-1] == SCHEDULE.sigma_max


def test_an_unknown_draw_is_refused() -> None:
    with pytest.raises(UserError, match="uniform, lognormal"):
        draw_levels(DiffusionLossConfig(levels="cosine"), SCHEDULE, torch.zeros(1))
