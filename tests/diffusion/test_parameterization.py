"""All networks are one denoiser: the textbook outputs, turned into x0, agree to 1e-12; factors are right to 1e-15."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import (
    PARAMETERIZATIONS,
    Law,
    check,
    make_parameterization,
    make_schedule,
    precondition,
)
from ldm.errors import UserError

LEVELS = [0.03, 1.0, 14.6]
NAMES = sorted(PARAMETERIZATIONS)


def textbook(name: str, x0: Tensor, n: Tensor, sigma: float) -> Tensor:
    """The output in the chain's terms: alpha^2 + s^2 = 1, v = alpha n - s x0 (Salimans & Ho 2022).

    edm for data of deviation 1, where its x0 - c_skip x, scaled to unit variance, is -v.
    """
    angle = math.atan(sigma)
    v = math.cos(angle) * n - math.sin(angle) * x0
    return {"eps": n, "x0": x0, "v": v, "flow": n - x0, "score": -n / sigma, "edm": -v}[name]


def exact(name: str, sigma: str, d: str) -> tuple[Decimal, Decimal]:
    """(c_skip, c_out) to 50 digits, solved from what the output is: x0 = c_skip (x0 + s n) + c_out (a x0 + b n)."""
    with localcontext() as context:
        context.prec = 50
        s, data = Decimal(sigma), Decimal(d)
        root = (1 + s**2).sqrt()
        a, b = {
            "eps": (Decimal(0), Decimal(1)),
            "x0": (Decimal(1), Decimal(0)),
            "v": (-s / root, 1 / root),
            "flow": (Decimal(-1), Decimal(1)),
            "score": (Decimal(0), -1 / s),
            # a x0 + b n of unit variance, uncorrelated with x, for x0 of variance data^2
            "edm": (s / data / (s**2 + data**2).sqrt(), -data / (s**2 + data**2).sqrt()),
        }[name]
        c_out = s / (a * s - b)
        return 1 - c_out * a, c_out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", ["0.03", "1", "14.6"])
@pytest.mark.parametrize("d", ["1", "0.5"])
def test_the_factors_to_1e_15(name: str, sigma: str, d: str) -> None:
    parameterization = make_parameterization(name, float(d))
    level = torch.tensor(float(sigma), dtype=torch.float64)
    found = float(parameterization.c_skip(level)), float(parameterization.c_out(level))
    for value, expected in zip(found, exact(name, sigma, d), strict=True):
        assert value == pytest.approx(float(expected), rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("sigma", ["0.03", "1", "14.6"])
def test_the_networks_inputs_to_1e_15(sigma: str) -> None:
    """c_in of each law, and the two that edm brings along, whatever the law."""
    level = torch.tensor(float(sigma), dtype=torch.float64)
    with localcontext() as context:
        context.prec = 50
        s = Decimal(sigma)
        laws = {"scaled_linear": 1 / (1 + s**2).sqrt(), "vp": 1 / (1 + s**2).sqrt(), "ve": 1, "flow": 1 / (1 + s)}
        c_in, c_noise = 1 / (s**2 + Decimal("0.25")).sqrt(), s.ln() / 4
    for kind, alpha in laws.items():
        found = float(make_schedule(ScheduleConfig(kind=kind)).alpha(level))
        assert found == pytest.approx(float(alpha), rel=1e-15)
    edm = make_parameterization("edm", 0.5)
    assert edm.c_in is not None and edm.c_noise is not None
    assert float(edm.c_in(level)) == pytest.approx(float(c_in), rel=1e-15)
    assert float(edm.c_noise(level)) == pytest.approx(float(c_noise), rel=1e-15, abs=1e-15)
    x_in, t = Law(make_schedule(ScheduleConfig(kind="ve")), edm).input(torch.ones(2, 1, 1, 1), level)
    assert x_in.flatten().tolist() == pytest.approx([float(c_in)] * 2, rel=1e-6)
    assert t.tolist() == pytest.approx([1000 * float(c_noise)] * 2, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("d", [0.5, 1.0, 3.0])
def test_edm_sees_and_predicts_unit_variance(d: float) -> None:
    """What its four numbers are for (their appendix B.6): by drawing, five standard errors."""
    generator = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, 1, 40000, 1, 1, generator=generator, dtype=torch.float64)
    edm, schedule = make_parameterization("edm", d), make_schedule(ScheduleConfig(kind="ve"))
    for sigma in (0.05, 1.0, 20.0):
        level = torch.tensor(sigma, dtype=torch.float64)
        x_in, _ = Law(schedule, edm).input(d * x0 + sigma * n, level)
        for unit in (x_in.double(), edm.target(d * x0, n, level)):
            assert float(unit.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 40000))


def test_a_network_is_told_the_ends_of_the_range_outside_it() -> None:
    schedule = make_schedule(ScheduleConfig(kind="ve"))
    outside = torch.tensor([0.0, 1e-9, 1e9], dtype=torch.float64)
    ends = torch.tensor([0.002, 0.002, 80.0], dtype=torch.float64)
    for name in NAMES:
        parameterization = make_parameterization(name)
        _, t = Law(schedule, parameterization).input(torch.ones(3, 1, 1, 1), outside)
        _, expected = Law(schedule, parameterization).input(torch.ones(3, 1, 1, 1), ends)
        assert t.isfinite().all() and torch.equal(t, expected)


@pytest.mark.parametrize(
    ("schedule", "name", "words"),
    [
        (ScheduleConfig(zero_terminal_snr=True), "eps", "eps cannot go .* choose v, x0, flow or edm"),
        (ScheduleConfig(zero_terminal_snr=True), "score", "score cannot go"),
        (ScheduleConfig(kind="flow"), "eps", "eps cannot go .* pure noise"),
        (ScheduleConfig(kind="flow"), "score", "score cannot go"),
    ],
)
def test_what_says_nothing_at_pure_noise_is_refused_there(schedule: ScheduleConfig, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(make_schedule(schedule), make_parameterization(name))
    for other in ("v", "x0", "flow", "edm"):
        check(make_schedule(schedule), make_parameterization(other))
    check(make_schedule(ScheduleConfig()), make_parameterization(name))


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_a_learned_variance_is_refused_where_there_is_no_chain(kind: str) -> None:
    with pytest.raises(UserError, match=r"learned_variance interpolates .* continuous time"):
        check(make_schedule(ScheduleConfig(kind=kind)), make_parameterization("v"), learned_variance=True)
    check(make_schedule(ScheduleConfig()), make_parameterization("v"), learned_variance=True)


def test_names_and_deviations_that_are_none() -> None:
    with pytest.raises(UserError, match="'epsilon'; choose one of eps, x0, v, flow, score, edm"):
        make_parameterization("epsilon")
    for deviation in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="sigma_data is"):
            make_parameterization("edm", deviation)


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
    """`precondition` around a float32 network; it sees z = alpha x and a time it can tell the level from.

    It may put out more channels, a learned variance, that are none of a denoiser's business.
    """
    schedule = make_schedule(ScheduleConfig())
    x0, n = data()

    def network(z: Tensor, t: Tensor) -> Tensor:
        assert z.dtype == t.dtype == torch.float32 and t.shape == (5,)
        level = float(schedule.sigma(t.double())[0]) if name != "edm" else math.exp(4 * float(t[0]) / 1000)
        assert level == pytest.approx(sigma, rel=1e-4)
        torch.testing.assert_close(z.double(), (x0 + sigma * n) / math.hypot(1, sigma), rtol=0, atol=1e-6)
        output = textbook(name, x0, n, sigma).float()
        return output if name != "v" else torch.cat([output, torch.full_like(output, math.nan)], dim=1)

    denoise = precondition(network, Law(schedule, PARAMETERIZATIONS[name]))
    found = denoise(x0 + sigma * n, torch.tensor(sigma, dtype=torch.float64))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-5)


def test_the_time_reaches_the_network_unrounded() -> None:
    schedule = make_schedule(ScheduleConfig())
    sigma = torch.stack([schedule.sigmas[3], (schedule.sigmas[10] * schedule.sigmas[11]).sqrt()])
    _, t = Law(schedule, PARAMETERIZATIONS["v"]).input(torch.zeros(2, 1, 1, 1), sigma)
    assert t.tolist() == [3.0, 10.5]
