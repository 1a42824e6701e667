"""Laws in continuous time against the papers' own forms, by integration, and as limits of chains."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_law, make_schedule
from ldm.errors import UserError
from ldm.sampling import ddim, make_grid, start

LAWS = {kind: make_schedule(ScheduleConfig(kind=kind)) for kind in ("vp", "ve", "flow", "edm")}


@given(kind=st.sampled_from(sorted(LAWS)), share=st.floats(0, 1))
@settings(deadline=None)
def test_time_and_level_are_inverse(kind: str, share: float) -> None:
    law = LAWS[kind]
    t = torch.tensor(law.t_min + share * (law.t_max - law.t_min), dtype=torch.float64)
    assume(kind != "flow" or not 999.999 < t < 1000)  # which stand for one level, the cut
    torch.testing.assert_close(law.t(law.sigma(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAWS)
def test_trained_levels_are_evenly_spaced_in_time(kind: str) -> None:
    law = LAWS[kind]
    assert law.steps == 1000 and law.sigmas.dtype == torch.float64
    t = law.t(law.sigmas)
    gaps = t.diff()
    torch.testing.assert_close(gaps, gaps[0].expand(len(gaps)), rtol=1e-6, atol=0)
    torch.testing.assert_close(law.sigma(t), law.sigmas, rtol=1e-9, atol=0)
    assert float(t[0]) == law.t_min and float(t[-1]) == law.t_max
    assert law.t_max == pytest.approx(math.log(80) / 4 if kind == "edm" else 1000, abs=1e-12)


@pytest.mark.parametrize("kind", LAWS)
def test_what_is_outside_the_range_gets_its_ends(kind: str) -> None:
    law = LAWS[kind]
    assert law.t(torch.tensor([0.0, 1e12])).tolist() == pytest.approx([law.t_min, law.t_max])
    found = law.sigma(torch.tensor([-5.0, 1e4], dtype=torch.float64))
    assert found.tolist() == pytest.approx([law.sigma_min, law.sigma_max])


@pytest.mark.parametrize("kind", LAWS)
def test_the_slope_is_the_derivative(kind: str) -> None:
    clock = LAWS[kind].clock
    assert clock is not None
    time = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    sigma = clock.sigma(time)
    (gradient,) = torch.autograd.grad(sigma.log().sum(), time)
    torch.testing.assert_close(clock.slope(sigma.detach()), gradient, rtol=1e-12, atol=0)


def test_vp_is_song_et_al() -> None:
    """Their appendix C: the mean's factor is exp(-(beta_max - beta_min) t^2 / 4 - beta_min t / 2)."""
    law = LAWS["vp"]
    for tau in (0.001, 0.1, 0.5, 1.0):
        factor = math.exp(-(20 - 0.1) * tau**2 / 4 - 0.1 * tau / 2)
        sigma = law.sigma(torch.tensor(1000 * tau, dtype=torch.float64))
        assert float(law.alpha(sigma)) == pytest.approx(factor, rel=1e-12)
        assert float(law.alpha(sigma) * sigma) == pytest.approx(math.sqrt(1 - factor**2), rel=1e-9)
    assert law.sigma_min == pytest.approx(0.010486, abs=1e-6) and law.sigma_max == pytest.approx(152.17, abs=0.01)


def test_vp_is_the_limit_of_the_linear_chain() -> None:
    """beta_i = beta(i / T) / T: alpha of the chain approaches that of the equation as 1 / T."""
    errors = []
    for steps in (1000, 2000):
        chain = make_schedule(ScheduleConfig(kind="linear", steps=steps, beta_start=0.1 / steps, beta_end=20 / steps))
        level = chain.sigmas[steps // 2 - 1]
        law = LAWS["vp"].sigma(torch.tensor(500.0, dtype=torch.float64))
        errors.append(abs(float(level / law) - 1))
    assert errors[0] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_a_constant_beta_needs_no_special_case() -> None:
    law = make_schedule(ScheduleConfig(kind="vp", beta_min=3.0, beta_max=3.0))
    sigma = law.sigma(torch.tensor([200.0, 1000.0], dtype=torch.float64))
    torch.testing.assert_close(sigma.square(), torch.tensor([0.6, 3.0]).double().expm1(), rtol=1e-6, atol=0)
    assert law.t(sigma).tolist() == pytest.approx([200, 1000])


def test_ve_is_geometric_between_its_ends() -> None:
    law = make_schedule(ScheduleConfig(kind="ve", sigma_min=0.01, sigma_max=50.0, steps=11))
    ratio = law.sigmas[1:] / law.sigmas[:-1]
    assert ratio.tolist() == pytest.approx([5000**0.1] * 10)
    assert (law.sigma_min, law.sigma_max) == (pytest.approx(0.01), pytest.approx(50))
    assert float(law.sigma(torch.tensor(500.0))) == pytest.approx(math.sqrt(0.5))
    assert law.alpha(law.sigmas).tolist() == [1.0] * 11


@pytest.mark.parametrize(("form", "deviation"), [("v", 1.0), ("edm", 1.0), ("edm", 0.5), ("eps", 1.0)])
def test_edm_is_karras_et_al(form: str, deviation: float) -> None:
    """Their table 1, and its descendants: v (CosXL) is F with its sign turned, eps has c_skip 1 and c_out -sigma."""
    law = make_law(ScheduleConfig("edm", sigma_max=120.0), form, deviation)
    sigma = torch.tensor([0.002, 0.7, 120.0], dtype=torch.float64)
    x, f = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    total = sigma**2 + deviation**2
    skip, out = deviation**2 / total, sigma * deviation * total.rsqrt()
    skip, out = (torch.ones(3), -sigma) if form == "eps" else (skip, -out if form == "v" else out)
    found, t = law.input(x, sigma)
    torch.testing.assert_close(found, (x * total.rsqrt()[:, None, None, None]).float())
    torch.testing.assert_close(t, (sigma.log() / 4).float())
    expected = skip[:, None, None, None] * x + out[:, None, None, None] * f
    torch.testing.assert_close(law.denoised(f, x, sigma), expected)
    x0, n = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    noisy = x0 + sigma[:, None, None, None] * n
    torch.testing.assert_close(law.denoised(law.target(x0, n, sigma), noisy, sigma), x0, rtol=0, atol=1e-9)


def test_flow_walks_straight_lines() -> None:
    """z = (1 - tau) x0 + tau n, and the network is told 1000 tau, whatever T is."""
    for steps in (1000, 10):
        law = make_schedule(ScheduleConfig(kind="flow", steps=steps))
        for tau in (0.2, 0.5, 0.9):
            sigma = law.sigma(torch.tensor(1000 * tau, dtype=torch.float64))
            assert float(law.alpha(sigma)) == pytest.approx(1 - tau, rel=1e-12)
            assert float(law.alpha(sigma) * sigma) == pytest.approx(tau, rel=1e-12)
        assert law.t(law.sigmas)[:-1].tolist() == pytest.approx([1000 * i / steps for i in range(1, steps)])
        assert law.sigma_max == 1e6 and law.pure_noise_end


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(kind, math.hypot(1, 14.6)) for kind in ("vp", "edm", "linear")] + [("ve", 14.6), ("flow", 15.6)],
)
def test_the_deviation_at_pure_noise(kind: str, expected: float) -> None:
    """sqrt(1 + s^2) where variance is preserved, 1 + s on straight paths, s where it explodes."""
    law = make_schedule(ScheduleConfig(kind=kind))
    sigma = torch.tensor([14.6, 0.0], dtype=torch.float64)
    assert float(law.start_scale(sigma)[0]) == pytest.approx(expected, rel=1e-15)
    noise = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(start(noise, law, sigma), noise.double() * expected)


@pytest.mark.parametrize("kind", [*LAWS, "sigmoid", "cosine"])
def test_from_the_laws_own_noise_to_the_data(kind: str) -> None:
    """The probability flow on data N(0.3, 0.8^2), 1-d: mean and deviation of what 500 steps make of unit noise.

    On a Gaussian a step is affine, so two noises tell both. The start lacks the data's mean and variance beside the
    noise's: at the end both are off by a factor near 1, less than 1.5 % even where the last sigma is 80.
    """
    law = make_schedule(ScheduleConfig(kind=kind))

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 + 0.64 / (0.64 + sigma**2) * (x - 0.3)

    sigmas = make_grid(law, 500)
    noise = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    *_, last = ddim()(denoiser, start(noise, law, sigmas), sigmas, pytest.fail)  # type: ignore[arg-type]
    mean, deviation = float(last.x[0]), float(last.x[1] - last.x[0])
    assert mean == pytest.approx(0.3, rel=0.015)
    assert deviation == pytest.approx(0.8, rel=0.015)


def test_a_table_of_levels_is_still_a_variance_preserving_chain() -> None:
    chain = Schedule(torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64))
    assert chain.is_chain and chain.preserves_variance and chain.t(chain.sigmas).tolist() == [0, 1, 2]
    assert not LAWS["vp"].is_chain and LAWS["vp"].preserves_variance and not LAWS["flow"].preserves_variance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "vp", "beta_min": 21.0}, "0 <= beta_min <= beta_max"),
        ({"kind": "vp", "beta_min": 0.0, "beta_max": 0.0}, "beta_max > 0"),
        ({"kind": "vp", "time_min": 0.0}, "time_min between 0 and 1"),
        ({"kind": "vp", "beta_max": 4000.0}, "cannot be resolved"),
        ({"kind": "ve", "sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"kind": "ve", "sigma_max": 0.001}, "0 < sigma_min < sigma_max"),
        ({"kind": "flow", "zero_terminal_snr": True}, "flow has none; set it to false"),
        ({"kind": "vp", "zero_terminal_snr": True}, "rescales a chain's table"),
        ({"kind": "ve", "steps": 1}, "at least 2"),
    ],
)
def test_what_is_no_law_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_schedule(ScheduleConfig(**change))  # type: ignore[arg-type]
