"""Grids: N steps asked are N steps run, where each spacing starts and ends, and what is even in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_schedule
from ldm.errors import UserError
from ldm.ranges import WEAKEST
from ldm.sampling import GRIDS, listed, make_grid, weakened
from ldm.sampling.spacings import ALIGNED, HIGHEST, TRAINED_GRIDS, beta_quantiles

SCHEDULE = make_schedule(ScheduleConfig())
PURE_NOISE = make_schedule(ScheduleConfig(zero_terminal_snr=True))
COSINE = make_schedule(ScheduleConfig(kind="cosine"))
EDM = Schedule(torch.logspace(math.log10(0.002), math.log10(80), 50, dtype=torch.float64))


@given(
    steps=st.integers(1, 1000),
    spacing=st.sampled_from(sorted(GRIDS.keys() - {"ays_svd"})),
    schedule=st.sampled_from([SCHEDULE, PURE_NOISE, COSINE]),
)
@settings(deadline=None)
def test_a_grid_has_the_steps_asked_for_and_decreases(steps: int, spacing: str, schedule: Schedule) -> None:
    if spacing == "lcm":
        steps = min(steps, 50)
    sigmas = make_grid(schedule, steps, spacing)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64 and sigmas.device.type == "cpu"
    assert bool((sigmas.diff() < 0).all())
    if spacing in TRAINED_GRIDS:
        times = schedule.t(sigmas[:-1])
        torch.testing.assert_close(times, times.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("schedule", [SCHEDULE, PURE_NOISE, COSINE, EDM], ids=["vp", "pure noise", "cosine", "edm"])
def test_ends(steps: int, schedule: Schedule) -> None:
    for spacing in GRIDS.keys() - {"leading", "logsnr", "ddim_uniform", "dpm_leading", "uniform", "ays_svd"}:
        if schedule is EDM and (spacing.startswith("ays") or (spacing == "lcm" and steps > 7)):
            continue
        sigmas = make_grid(schedule, steps, spacing)
        assert sigmas[0] == schedule.sigma_max and sigmas[-1] == 0
    for spacing in ("leading", "logsnr"):
        assert make_grid(schedule, steps, spacing)[-1] == schedule.sigma_min
    assert make_grid(schedule, steps, "logsnr")[0] == schedule.sigma_max
    for spacing in ("linspace", "normal", "karras", "exponential", "polyexponential", "kl_optimal"):
        assert float(make_grid(schedule, max(steps, 2), spacing)[-2]) == pytest.approx(schedule.sigma_min, rel=1e-12)


def test_the_whole_chain_is_the_same_in_every_spacing_of_trained_levels() -> None:
    expected = torch.cat([SCHEDULE.sigmas.flip(0), torch.zeros(1, dtype=torch.float64)])
    for spacing in TRAINED_GRIDS.keys() - {"lcm"}:
        assert torch.equal(make_grid(SCHEDULE, 1000, spacing), expected)


def test_karras_is_equation_5() -> None:
    """With the paper's numbers, 80 to 0.002 in 18 steps, written out again."""
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(make_grid(EDM, 18, "karras").tolist(), [*expected, 0.0], rtol=1e-12, atol=0)


def test_what_is_even_in_what() -> None:
    times = SCHEDULE.t(make_grid(SCHEDULE, 20, "normal")[:-1])
    torch.testing.assert_close(times, torch.linspace(999, 0, 20, dtype=torch.float64), rtol=0, atol=1e-6)
    times = SCHEDULE.t(make_grid(SCHEDULE, 7, "sgm_uniform")[:-1])
    torch.testing.assert_close(times, 999 * (1 - torch.arange(7).double() / 7), rtol=0, atol=1e-6)
    angles = make_grid(SCHEDULE, 20, "kl_optimal")[:-1].atan().diff()
    torch.testing.assert_close(angles, angles[:1].expand(19), rtol=1e-9, atol=0)
    logs = make_grid(SCHEDULE, 20, "polyexponential", 2.0)[:-1].log() - math.log(SCHEDULE.sigma_min)
    roots = logs.clamp(min=0).sqrt().diff()
    torch.testing.assert_close(roots, roots[:1].expand(19), rtol=1e-6, atol=0)
    poly, exponential = make_grid(SCHEDULE, 20, "polyexponential"), make_grid(SCHEDULE, 20, "exponential")
    torch.testing.assert_close(poly, exponential, rtol=1e-12, atol=0)
    expected = [(80 ** (1 / 3) + i / 5 * (0.002 ** (1 / 3) - 80 ** (1 / 3))) ** 3 for i in range(6)]
    torch.testing.assert_close(make_grid(EDM, 6, "karras", 3.0).tolist(), [*expected, 0.0], rtol=1e-9, atol=0)


def test_trained_levels_of_other_codes() -> None:
    """ComfyUI's, and latent consistency models', written out by their formulas in t."""

    def times(spacing: str, steps: int) -> list[int]:
        return SCHEDULE.t(make_grid(SCHEDULE, steps, spacing)[:-1]).round().int().tolist()

    assert times("simple", 30) == [999 - int(i * 1000 / 30) for i in range(30)]
    assert times("ddim_uniform", 20) == list(range(1, 1000, 50))[::-1]
    assert len(times("ddim_uniform", 30)) == 30, "where theirs has 31"
    assert times("dpm_leading", 20) == [i * (1000 // 21) + 1 for i in range(20, 0, -1)]
    assert times("lcm", 4) == [999, 759, 499, 259] and times("lcm", 50) == list(range(19, 1000, 20))[::-1]
    with pytest.raises(UserError, match=r"51 steps .* 50 levels"):
        make_grid(SCHEDULE, 51, "lcm")


def test_beta_has_the_quantiles_of_its_law() -> None:
    special = pytest.importorskip("scipy.special")
    shares = np.array([1e-4, 0.01, 0.3, 0.5, 0.501, 0.7, 0.999, 1.0])
    for a in (0.3, 0.6, 2.0):
        assert beta_quantiles(shares, a) == pytest.approx(special.betaincinv(a, a, shares), rel=1e-9)
    times = SCHEDULE.t(make_grid(SCHEDULE, 10, "beta")[:-1])
    expected = 999 * special.betaincinv(0.6, 0.6, 1 - np.arange(10) / 10)
    torch.testing.assert_close(times, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_align_your_steps_is_the_published_table() -> None:
    """At 10 steps its levels; at 20 each second one, and the geometric means between; the law's own end first."""
    table = ALIGNED["ays_sdxl"]
    ten, twenty = (make_grid(SCHEDULE, steps, "ays_sdxl") for steps in (10, 20))
    torch.testing.assert_close(ten[1:-1].tolist(), list(table[1:-1]), rtol=1e-12, atol=0)
    torch.testing.assert_close(twenty[2:-1:2], ten[1:-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(float(twenty[3]), math.sqrt(table[1] * table[2]), rtol=1e-12, atol=0)
    assert ten[0] == SCHEDULE.sigma_max and make_grid(PURE_NOISE, 10, "ays_sdxl")[0] == PURE_NOISE.sigma_max
    with pytest.raises(UserError, match=r"ays_svd has levels from 54.5 .* ends at 14.6"):
        make_grid(SCHEDULE, 10, "ays_svd")
    assert make_grid(Schedule(torch.tensor([0.002, 700.0], dtype=torch.float64)), 10, "ays_svd")[1] == pytest.approx(
        54.5
    )


def test_exponential_and_logsnr_are_even_in_log_snr_and_differ_at_the_end() -> None:
    exponential, logsnr = make_grid(SCHEDULE, 12, "exponential"), make_grid(SCHEDULE, 11, "logsnr")
    assert torch.equal(exponential[:-1], logsnr)
    spans = (-2 * logsnr.log()).diff()
    torch.testing.assert_close(spans, spans[:1].expand(11), rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "polyexponential", "kl_optimal", "logsnr"])
@pytest.mark.parametrize("schedule", [PURE_NOISE, COSINE], ids=["pure noise", "cosine"])
def test_no_steps_are_spent_in_pure_noise(spacing: str, schedule: Schedule) -> None:
    """Beyond the cap there is the law's own first level and nothing else; the rest is what a law up to it would get."""
    sigmas = make_grid(schedule, 20, spacing)
    assert sigmas[0] == schedule.sigma_max > HIGHEST > sigmas[1]
    capped = Schedule(torch.tensor([schedule.sigma_min, HIGHEST], dtype=torch.float64))
    torch.testing.assert_close(sigmas[1:], make_grid(capped, 20, spacing)[1:], rtol=1e-12, atol=0)


def test_a_formula_may_have_more_steps_than_there_are_trained_levels() -> None:
    assert len(make_grid(SCHEDULE, 1500, "karras")) == 1501


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"{steps} steps.*between 1 and 1000"):
        make_grid(SCHEDULE, steps)
    if steps < 1:
        with pytest.raises(UserError, match=f"{steps} steps.*at least 1"):
            make_grid(SCHEDULE, steps, "karras")


def test_an_unknown_spacing_is_refused() -> None:
    with pytest.raises(UserError, match=r"leading, trailing, linspace, .*karras"):
        make_grid(SCHEDULE, 10, "squares")


def test_levels_written_out() -> None:
    sigmas = listed(SCHEDULE, [14.6146, 3, 0.5, 0])  # sigma_max is 14.61464..., written short
    assert sigmas.tolist() == [14.6146, 3, 0.5, 0] and sigmas.dtype == torch.float64
    assert listed(SCHEDULE, [2.0, 0.1]).tolist() == [2.0, 0.1]


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ([1.0], "1 levels"),
        ([], "0 levels"),
        ([1.0, 1.0, 0.0], "from 1 to 1"),
        ([1.0, 2.0, 0.0], "from 1 to 2"),
        ([1.0, -0.5], "negative"),
        ([math.inf, 1.0], "not finite"),
        ([1.0, math.nan, 0.0], "not finite"),
        ([20.0, 1.0, 0.0], "begins at 20.*ends at 14.6"),
    ],
)
def test_levels_that_are_no_grid_are_refused(levels: list[float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        listed(SCHEDULE, levels)


@given(
    steps=st.integers(1, 200),
    strength=st.floats(WEAKEST, 1.0),
    spacing=st.sampled_from(sorted(GRIDS.keys() - {"ays_svd"})),
)
@settings(deadline=None)
def test_a_strength_is_a_level_whatever_the_steps_and_all_steps_are_run(
    steps: int, strength: float, spacing: str
) -> None:
    sigmas = make_grid(SCHEDULE, min(steps, 50) if spacing == "lcm" else steps, spacing)
    lower = weakened(SCHEDULE, sigmas, strength)
    assert len(lower) == len(sigmas) and bool((lower.diff() < 0).all()), "a grid like any other"
    assert float(lower[-1]) == float(sigmas[-1]), "and it ends where it ended"
    assert float(SCHEDULE.t(lower[0])) == pytest.approx(strength * float(SCHEDULE.t(sigmas[0])), abs=1e-6)


@pytest.mark.parametrize("kind", ["scaled_linear", "cosine", "flow", "ve", "vp"])
def test_the_ends_of_strength(kind: str) -> None:
    schedule = make_schedule(ScheduleConfig(kind=kind))
    sigmas = make_grid(schedule, 10)
    assert torch.equal(weakened(schedule, sigmas, 1.0), sigmas)
    assert weakened(schedule, sigmas, 0.0).tolist() == [0.0]
    torch.testing.assert_close(weakened(schedule, sigmas, 1 - 1e-9)[1:], sigmas[1:], rtol=1e-4, atol=0)
    assert float(weakened(schedule, sigmas, WEAKEST)[0]) < 3 * schedule.sigma_min


def test_levels_below_the_trained_ones_stay() -> None:
    low = SCHEDULE.sigma_min / 2
    lower = weakened(SCHEDULE, listed(SCHEDULE, [14.0, 1.0, low, 0.0]), 0.5)
    assert lower[2:].tolist() == [low, 0.0] and float(lower[0]) < 2 and bool((lower.diff() < 0).all())


def test_strengths_that_mean_nothing_are_refused() -> None:
    for strength in (-0.1, 1.01, math.nan, 1e-9):
        with pytest.raises(UserError, match="strength"):
            weakened(SCHEDULE, make_grid(SCHEDULE, 10), strength)
