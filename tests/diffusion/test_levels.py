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


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_uniform_is_uniform_in_continuous_time(kind: str) -> None:
    law = make_schedule(ScheduleConfig(kind=kind))
    uniform = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = torch.linspace(law.t_min, law.t_max, 9, dtype=torch.float64)
    torch.testing.assert_close(law.t(draw_levels(DiffusionLossConfig(), law, uniform)), expected, rtol=1e-9, atol=1e-9)


def test_logit_normal_is_that_of_flows_time() -> None:
    """Esser et al. 2024, equation 19, with m = 0 and s = 1 unless told otherwise."""
    flow = make_schedule(ScheduleConfig(kind="flow"))
    quantiles = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
    for config, mean, std in (
        (DiffusionLossConfig(levels="logit_normal"), 0.0, 1.0),
        (DiffusionLossConfig(levels="logit_normal", level_mean=0.5, level_std=0.6), 0.5, 0.6),
    ):
        tau = flow.t(draw_levels(config, flow, quantiles)) / 1000
        expected = [NormalDist(mean, std).inv_cdf(q) for q in quantiles.tolist()]
        assert torch.logit(tau).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_logit_normal_is_lognormal() -> None:
    """logit tau = ln sigma: with one mean and deviation they are one draw, and each has its papers' by default."""
    uniform = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    names = ("lognormal", "logit_normal")
    same = [
        draw_levels(DiffusionLossConfig(levels=n, level_mean=-0.3, level_std=0.8), SCHEDULE, uniform) for n in names
    ]
    assert torch.equal(same[0], same[1])
    own = [draw_levels(DiffusionLossConfig(levels=n), SCHEDULE, uniform).log().mean() for n in names]
    assert [float(each) for each in own] == pytest.approx([-1.2, 0.0], abs=0.02)


@pytest.mark.parametrize("levels", ["uniform", "lognormal", "logit_normal"])
def test_every_uniform_gives_a_trained_level(levels: str) -> None:
    config = DiffusionLossConfig(levels=levels, level_std=5.0)
    ends = torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-24])
    drawn = draw_levels(config, SCHEDULE, ends)
    assert bool(((drawn >= SCHEDULE.sigma_min) & (drawn <= SCHEDULE.sigma_max)).all())
    assert drawn[0] == SCHEDULE.sigma_min and drawn[-1] == SCHEDULE.sigma_max


def test_an_unknown_draw_is_refused() -> None:
    with pytest.raises(UserError, match="uniform, lognormal, logit_normal"):
        draw_levels(DiffusionLossConfig(levels="cosine"), SCHEDULE, torch.zeros(1))
