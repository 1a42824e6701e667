"""eps, x0 and v are one denoiser: the textbook outputs, turned into x0, agree to 1e-12."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import PARAMETERIZATIONS, make_schedule, network_input, precondition

LEVELS = [0.03, 1.0, 14.6]
NAMES = sorted(PARAMETERIZATIONS)


def textbook(name: str, x0: Tensor, n: Tensor, sigma: float) -> Tensor:
    """The output in the chain's terms: alpha^2 + s^2 = 1, v = alpha n - s x0 (Salimans & Ho 2022)."""
    angle = math.atan(sigma)
    return {"eps": n, "x0": x0, "v": math.cos(angle) * n - math.sin(angle) * x0}[name]


def data(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 4, 3, 3, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", LEVELS)
def test_every_parameterization_gives_the_same_x0(name: str, sigma: float) -> None:
    x0, n = data()
    level = torch.tensor(sigma, dtype=torch.float64)
    found = PARAMETERIZATIONS[name].denoised(textbook(name, x0, n, sigma), x0 + sigma * n, level)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", LEVELS)
def test_the_target_is_the_textbooks(name: str, sigma: float) -> None:
    x0, n = data()
    target = PARAMETERIZATIONS[name].target(x0, n, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(target, textbook(name, x0, n, sigma), rtol=0, atol=1e-12)


@given(name=st.sampled_from(NAMES), levels=st.lists(st.floats(0.01, 100), min_size=5, max_size=5))
@settings(deadline=None)
def test_the_target_makes_the_denoiser_exact(name: str, levels: list[float]) -> None:
    """D = x0 with F = F*, each picture at a level of its own."""
    x0, n = data()
    sigma = torch.tensor(levels, dtype=torch.float64)
    parameterization = PARAMETERIZATIONS[name]
    x = x0 + sigma.reshape(-1, 1, 1, 1) * n
    found = parameterization.denoised(parameterization.target(x0, n, sigma), x, sigma)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-11)


def test_float32_targets_do_not_cancel_at_small_levels() -> None:
    x0, n = (each.float() for each in data())
    target = PARAMETERIZATIONS["eps"].target(x0, n, torch.tensor(1e-4))
    torch.testing.assert_close(target, n, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", LEVELS)
def test_a_network_that_knows_the_answer_is_the_perfect_denoiser(name: str, sigma: float) -> None:
    """`precondition` around a float32 network; it sees z = alpha x and a time it can tell the level from."""
    schedule = make_schedule(ScheduleConfig())
    x0, n = data()

    def network(z: Tensor, t: Tensor) -> Tensor:
        assert z.dtype == t.dtype == torch.float32 and t.shape == (5,)
        level = float(schedule.sigma(t.double())[0])
        assert level == pytest.approx(sigma, rel=1e-4)
        torch.testing.assert_close(z.double(), (x0 + sigma * n) / math.hypot(1, sigma), rtol=0, atol=1e-6)
        return textbook(name, x0, n, sigma).float()

    denoise = precondition(network, schedule, PARAMETERIZATIONS[name])
    found = denoise(x0 + sigma * n, torch.tensor(sigma, dtype=torch.float64))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-5)


def test_the_time_reaches_the_network_unrounded() -> None:
    schedule = make_schedule(ScheduleConfig())
    sigma = torch.stack([schedule.sigmas[3], (schedule.sigmas[10] * schedule.sigmas[11]).sqrt()])
    _, t = network_input(torch.zeros(2, 1, 1, 1), sigma, schedule)
    assert t.tolist() == [3.0, 10.5]
