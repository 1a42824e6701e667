"""Grids: N steps asked are N steps run, where each spacing starts and ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.sampling import GRIDS, make_grid

SCHEDULE = make_schedule(ScheduleConfig())


@given(steps=st.integers(1, 1000), spacing=st.sampled_from(sorted(GRIDS)))
@settings(deadline=None)
def test_a_grid_has_the_steps_asked_for_and_decreases(steps: int, spacing: str) -> None:
    sigmas = make_grid(SCHEDULE, steps, spacing)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64 and sigmas.device.type == "cpu"
    assert bool((sigmas.diff() < 0).all())
    times = SCHEDULE.t(sigmas[:-1])
    torch.testing.assert_close(times, times.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_ends(steps: int) -> None:
    for spacing in ("trailing", "linspace"):
        sigmas = make_grid(SCHEDULE, steps, spacing)
        assert sigmas[0] == SCHEDULE.sigma_max and sigmas[-1] == 0
    assert make_grid(SCHEDULE, steps, "leading")[-1] == SCHEDULE.sigma_min
    assert make_grid(SCHEDULE, max(steps, 2), "linspace")[-2] == SCHEDULE.sigma_min


def test_the_whole_chain_is_the_same_in_every_spacing() -> None:
    expected = torch.cat([SCHEDULE.sigmas.flip(0), torch.zeros(1, dtype=torch.float64)])
    for spacing in GRIDS:
        assert torch.equal(make_grid(SCHEDULE, 1000, spacing), expected)


def test_a_grid_of_a_law_that_ends_in_noise_starts_at_its_cut() -> None:
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    assert make_grid(schedule, 20, "trailing")[0] == schedule.sigma_max == 1e6


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"{steps} steps.*between 1 and 1000"):
        make_grid(SCHEDULE, steps)


def test_an_unknown_spacing_is_refused() -> None:
    with pytest.raises(UserError, match="leading, trailing, linspace"):
        make_grid(SCHEDULE, 10, "karras")
