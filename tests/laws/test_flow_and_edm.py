"""Rectified flow with a shift, and EDM's law: on the model's own grid every sampler nears the law of Gaussian data,
exactly known.

The start is z = n, at t = 1, cut at sigma 1e6, or at sigma 120, and knows nothing of the data; what remains is the
sampler's error, in the output's mean and covariance (affine.py). `ode` chooses its steps by the picture, so is no
affine map; it is compared with the flow's end point.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from ldm.config import DiffusionLossConfig, ScheduleConfig
from ldm.diffusion import Schedule, draw_levels, make_schedule
from ldm.jobs import catalogue
from ldm.sampling import SAMPLERS, make_grid, ode

from .affine import output_law
from .closed_forms import Gaussian, three_dimensional
from .test_gaussian import consistency

SCHEDULE = make_schedule(ScheduleConfig(kind="flow", shift=3.0))
EDM = make_schedule(ScheduleConfig("edm", sigma_max=120.0))
DATA = three_dimensional()
OPTIONS = {
    "pc": {"moves": 0},
    "langevin": {"moves": 30, "step_size": 0.2},
}  # pc's moves are scaled by norms: no affine map
AFFINE = sorted(set(SAMPLERS) - {"ode", "dpm_adaptive", "lcm"})


def error(name: str, steps: int, spacing: str, data: Gaussian = DATA, schedule: Schedule = SCHEDULE) -> float:
    """Of mean and covariance, in units of the data's."""
    of_model = {"schedule": schedule, "unguided": data.denoiser}
    taken = {each: of_model[each] for each in inspect.signature(SAMPLERS[name]).parameters if each in of_model}
    sampler = SAMPLERS[name](**taken, **OPTIONS.get(name, {}))
    sigmas = make_grid(schedule, steps, spacing)
    start = schedule.start_scale(sigmas[0]) ** 2 * torch.eye(3, dtype=torch.float64)
    noise = catalogue.SAMPLERS[name].noise
    found = output_law(sampler, data, sigmas, torch.zeros(3, dtype=torch.float64), start, noise)
    away = (found.mean - DATA.mean).norm() / DATA.covariance.diagonal().sum().sqrt()
    return float(away + (found.covariance - DATA.covariance).norm() / DATA.covariance.norm())


@pytest.mark.parametrize("spacing", ["uniform", "trailing"])
@pytest.mark.parametrize("name", AFFINE)
def test_every_sampler_nears_the_data_on_a_shifted_grid(name: str, spacing: str) -> None:
    few, many = (error(name, steps, spacing) for steps in ((6, 24) if name == "langevin" else (25, 100)))
    ratio, bound = (
        (1.0, 0.12) if name == "langevin" else (2.5, 0.1)
    )  # whose error is that of the moves' length, not of their levels
    assert many < few / ratio and many < bound, (few, many)


@pytest.mark.parametrize("name", AFFINE)
def test_every_sampler_nears_the_data_between_edms_levels(name: str) -> None:
    """On the default grid, even in ln sigma here; the start lacks a part in 14,400 of the variance."""
    few, many = (error(name, steps, "trailing", DATA, EDM) for steps in ((6, 24) if name == "langevin" else (25, 100)))
    ratio, bound = (1.0, 0.12) if name == "langevin" else (2.5, 0.15)  # those of first order are the last
    assert many < max(few / ratio, 1e-3) and many < bound, (few, many)


def test_consistency_and_adaptive_steps_reach_the_flows_end() -> None:
    class Consistent(Gaussian):
        denoiser = staticmethod(consistency(DATA))  # type: ignore[assignment]

    assert error("lcm", 4, "uniform", Consistent(DATA.mean, DATA.covariance)) < 1e-5  # the start lacks 1e-6 of it
    sigmas = make_grid(SCHEDULE, 4, "uniform")
    torch.manual_seed(0)
    x = SCHEDULE.start_scale(sigmas[0]) * torch.randn(2, 1, 1, 3, dtype=torch.float64)

    def each(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.stack([DATA.denoiser(row, one) for row, one in zip(x, sigma.expand(len(x)), strict=True)])

    *_, last = ode()(each, x, sigmas, pytest.fail)  # type: ignore[arg-type]
    torch.testing.assert_close(last.x, consistency(DATA)(x, sigmas[0]), rtol=0, atol=2e-3)


def test_the_shift_is_that_of_equation_23_in_grids_and_draws() -> None:
    plain = make_schedule(ScheduleConfig(kind="flow"))

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return 3 * t / (1 + 2 * t)

    def time(sigma: torch.Tensor) -> torch.Tensor:
        return sigma / (1 + sigma)

    for spacing in ("trailing", "linspace", "leading"):
        ours, before = (time(make_grid(schedule, 10, spacing)) for schedule in (SCHEDULE, plain))
        torch.testing.assert_close(ours, shifted(before), rtol=0, atol=1e-6)  # the cut of both at 1e6
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for levels in ("logit_normal", "uniform"):
        config = DiffusionLossConfig(levels=levels)
        ours, before = (time(draw_levels(config, schedule, uniform)) for schedule in (SCHEDULE, plain))
        torch.testing.assert_close(ours, shifted(before), rtol=0, atol=1e-9)
    torch.testing.assert_close(SCHEDULE.t(SCHEDULE.sigmas), plain.t(plain.sigmas))  # a level's time is what it was
    assert float(time(make_grid(SCHEDULE, 28, "uniform"))[-2]) == pytest.approx(0.00893, abs=1e-5)
