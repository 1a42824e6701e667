"""Schedules: Stable Diffusion's numbers, the time of a level, what is refused. The laws are in tests/laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError

STABLE_DIFFUSION = make_schedule(ScheduleConfig())


def test_stable_diffusions_ends() -> None:
    assert round(STABLE_DIFFUSION.sigma_min, 7) == 0.0291672
    assert round(STABLE_DIFFUSION.sigma_max, 4) == 14.6146
    assert STABLE_DIFFUSION.sigmas.dtype == torch.float64 and STABLE_DIFFUSION.steps == 1000


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero", [False, True])
def test_trained_levels_have_whole_times(kind: str, zero: bool) -> None:
    schedule = make_schedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero))
    times = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.t(schedule.sigmas), times, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.sigma(times), schedule.sigmas, rtol=1e-12, atol=0)


@given(st.floats(0, 999))
@settings(deadline=None)
def test_time_and_level_are_inverse(t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(STABLE_DIFFUSION.t(STABLE_DIFFUSION.sigma(time)), time, rtol=0, atol=1e-8)


def test_time_is_linear_in_log_sigma_and_not_rounded() -> None:
    between = (STABLE_DIFFUSION.sigmas[400] * STABLE_DIFFUSION.sigmas[401]).sqrt()
    assert float(STABLE_DIFFUSION.t(between)) == pytest.approx(400.5, abs=1e-9)


def test_levels_outside_the_range_have_its_ends() -> None:
    outside = torch.tensor([0.0, 1e-3, 20.0, 1e9])
    assert STABLE_DIFFUSION.t(outside).tolist() == [0, 0, 999, 999]
    assert STABLE_DIFFUSION.t(outside).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "quadratic"}, "quadratic.*linear, scaled_linear, cosine, sigmoid, vp, ve, flow"),
        ({"steps": 1}, "at least 2"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_start": 0.02}, "beta_start <= beta_end"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_start": 0.5, "beta_end": 0.9}, "cannot be resolved"),
        ({"beta_start": 0.1, "beta_end": 0.2, "steps": 400, "zero_terminal_snr": True}, "cannot be resolved"),
    ],
)
def test_what_is_no_chain_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_schedule(ScheduleConfig(**change))  # type: ignore[arg-type]


def test_the_sigmoid_law_is_the_papers() -> None:
    """Chen 2023, algorithm 1, at the chain's times; the last level only is held back by the largest beta, 0.999."""
    schedule = make_schedule(ScheduleConfig(kind="sigmoid", steps=50))

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def gamma(t: float) -> float:
        return (logistic(3) - logistic(t * 6 - 3)) / (logistic(3) - logistic(-3))

    expected = [gamma((i + 1) / 50) for i in range(50)]
    assert schedule.alphas_cumprod[:-1].tolist() == pytest.approx(expected[:-1], rel=1e-9)
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(expected[-2] * 0.001, rel=1e-9)
    assert gamma(0) == 1 and gamma(1) == 0
    # symmetric: as much is kept at t as is lost at 1 - t
    kept = schedule.alphas_cumprod
    torch.testing.assert_close(kept[:49], 1 - kept[:49].flip(0), rtol=0, atol=1e-12)


def test_a_chain_starts_in_unit_noise() -> None:
    sigma = torch.tensor([0.1, 14.6], dtype=torch.float64)
    torch.testing.assert_close(
        STABLE_DIFFUSION.start_scale(sigma) * STABLE_DIFFUSION.alpha(sigma), torch.ones(2).double()
    )
    assert (STABLE_DIFFUSION.t_min, STABLE_DIFFUSION.t_max) == (0, 999)
