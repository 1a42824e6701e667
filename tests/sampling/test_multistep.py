"""Multistep methods, and DPM-Solver-3 in single steps: each against its definition, and the order that it has."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.sampling import (
    Sampler,
    deis,
    dpm_fast,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    euler,
    gradient_estimation,
    ipndm,
    lms,
    make_grid,
    plms,
    res_multistep,
    unipc,
)
from ldm.sampling.adams import integrals
from ldm.sampling.single_step import orders, places

SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (2, 3, 3)
X = 14.0 * torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x.roll(1, dims=-1) / (1 + sigma**2).sqrt() + x.mean(dim=(1, 2, 3), keepdim=True))


def end(sampler: Sampler, sigmas: Tensor) -> Tensor:
    *_, last = sampler(denoiser, X, sigmas, pytest.fail)  # type: ignore[arg-type]
    return last.x


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_lms_is_the_integral_of_lagranges_polynomial_in_sigma() -> None:
    """As in k-diffusion: by numerical quadrature, to 0 too."""
    integrate = pytest.importorskip("scipy.integrate")
    sigmas = make_grid(SCHEDULE, 9, "karras")
    t, x, slopes = sigmas.tolist(), X, []
    for i in range(9):
        slopes.insert(0, (x - denoiser(x, sigmas[i])) / t[i])
        slopes = slopes[:4]
        for j, slope in enumerate(slopes):

            def lagrange(at: float, i: int = i, j: int = j, count: int = len(slopes)) -> float:
                return math.prod((at - t[i - k]) / (t[i - j] - t[i - k]) for k in range(count) if k != j)

            x = x + integrate.quad(lagrange, t[i], t[i + 1], epsabs=1e-13)[0] * slope
    assert_same(end(lms(), sigmas), x)


def test_of_equal_steps_lms_and_ipndm_are_adams_and_bashforths() -> None:
    even = torch.linspace(14.0, 2.0, 13, dtype=torch.float64)
    for order in (1, 2, 3, 4):
        assert_same(end(lms(order), even), end(ipndm(order), even))
    assert float((end(ipndm(), even) - end(plms(), even)).norm()) > 1e-3, "plms begins with Heun's step"


def test_the_limits_of_each() -> None:
    sigmas = make_grid(SCHEDULE, 10, "karras")
    for sampler in (lms(1), deis(1), res_multistep(1), ipndm(1), gradient_estimation(1.0)):
        assert_same(end(sampler, sigmas), end(euler(), sigmas))
    assert_same(end(res_multistep(2), sigmas), end(dpmpp_2m_sde(0.0, solver="heun"), sigmas))
    assert_same(end(res_multistep(3), sigmas), end(dpmpp_3m_sde(0.0), sigmas))
    assert_same(end(gradient_estimation(1.5), sigmas), end(ipndm(2), sigmas))


def test_gradient_estimation_is_its_algorithm() -> None:
    """Permenter & Yuan 2024: with eps_bar = gamma eps_t + (1 - gamma) eps_(t + 1), gamma = 2."""
    sigmas, x, before = make_grid(SCHEDULE, 8, "trailing"), X, None
    for s, r in pairwise(sigmas):
        eps = (x - denoiser(x, s)) / s
        x = x + (r - s) * (eps if before is None or r == 0 else 2 * eps - before)
        before = eps
    assert_same(end(gradient_estimation(), sigmas), x)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_weights_are_the_integrals(order: int) -> None:
    """In log sigma, from 3 to 1: of 1, u, u^2 .. times e^u, by Simpson's rule."""
    points = [math.log(level) for level in (3.0, 4.5, 8.0, 9.0)[:order]]
    weights = integrals(points, 0.0, np.exp)
    u = np.linspace(points[0], 0.0, 2001)
    simpson = np.r_[1, np.tile([4, 2], 999), 4, 1] * (u[1] - u[0]) / 3
    for power in range(order):
        found = sum(weight * point**power for weight, point in zip(weights, points, strict=True))
        assert found == pytest.approx(float(simpson @ (u**power * np.exp(u))), rel=1e-9)


def test_dpm_fast_is_dpm_solver_3() -> None:
    """Lu et al. 2022, algorithm 2 on eps, r1 = 1/3 and r2 = 2/3, then 2 (r1 = 1/2) and 1; ends at sigma_min."""
    sigmas = make_grid(SCHEDULE, 6, "logsnr")

    def eps(x: Tensor, t: float) -> Tensor:
        return (x - denoiser(x, torch.tensor(math.exp(-t), dtype=torch.float64))) * math.exp(t)

    t = [-math.log(level) for level in sigmas.tolist()]
    x, h = X, t[3] - t[0]
    first = eps(x, t[0])
    u1 = x - math.exp(-t[1]) * math.expm1(h / 3) * first
    change1 = eps(u1, t[1]) - first
    u2 = x - math.exp(-t[2]) * (math.expm1(2 * h / 3) * first + 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * change1)
    change2 = eps(u2, t[2]) - first
    x = x - math.exp(-t[3]) * (math.expm1(h) * first + 1.5 * (math.expm1(h) / h - 1) * change2)
    half = x - math.exp(-t[4]) * math.expm1(t[4] - t[3]) * eps(x, t[3])
    x = x - math.exp(-t[5]) * math.expm1(t[5] - t[3]) * eps(half, t[4])
    x = x - math.exp(-t[6]) * math.expm1(t[6] - t[5]) * eps(x, t[5])
    assert_same(end(dpm_fast(), sigmas), x)


def test_how_dpm_fast_groups_a_grid() -> None:
    assert [orders(count) for count in range(8)] == [[], [1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1], [3, 3, 1]]
    grouped = [(0, 3), (1, 3), (2, 3), (0, 1), (0, 1)]
    assert places([9, 6, 4, 3, 2, 0]) == grouped
    assert places([1e6, 9, 6, 4, 3, 2, 0]) == [(0, 1), *grouped], "a leap is a step by itself"
    assert places([9, 0]) == [(0, 1)]


def flow_errors(sampler: Sampler) -> list[float]:
    """Relative, on Gaussian data of four variances; from 1e4, where the first steps, of lower order, do no harm."""
    variances = torch.tensor([0.3, 0.7, 1.0, 2.5], dtype=torch.float64).reshape(1, 1, 1, 4)
    found = []
    for steps in (64, 128, 256):
        sigmas = torch.linspace(math.log(1e4), math.log(0.3), steps + 1, dtype=torch.float64).exp()
        exact = ((variances + sigmas[-1] ** 2) / (variances + sigmas[0] ** 2)).sqrt()
        steps_taken = sampler(
            lambda x, sigma: x * variances / (variances + sigma**2),
            torch.ones_like(variances),
            sigmas,
            pytest.fail,  # type: ignore[arg-type]
        )
        *_, last = steps_taken
        found.append(float((last.x / exact - 1).norm()))
    return found


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("factory", [lms, deis, res_multistep])
def test_the_order_is_the_one_asked_for(factory, order: int) -> None:
    errors = flow_errors(factory(order))
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert rates[-1] > order - 0.3, (errors, rates)


def test_unipc_lowers_its_last_orders_in_few_steps() -> None:
    """On Gaussian data of deviation 0.5, from pure noise on leading levels: 5 steps of order 3."""
    sigmas = make_grid(SCHEDULE, 5, "leading")
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    *_, last = unipc(3)(lambda x, sigma: x / (1 + 4 * sigma**2), x, sigmas, pytest.fail)  # type: ignore[arg-type]
    exact = math.sqrt((0.25 + float(sigmas[-1]) ** 2) / (0.25 + float(sigmas[0]) ** 2))
    assert abs(float(last.x) / exact - 1) < 0.15


def test_nonsense_is_refused() -> None:
    for factory in (lms, deis, res_multistep, ipndm):
        for order in (0, 5):
            with pytest.raises(UserError, match=f"the order of {factory.__name__} is {order}"):
                factory(order)
    with pytest.raises(UserError, match="gamma"):
        gradient_estimation(math.inf)
