"""DPM adaptive: its algorithm written out, the tolerance that it keeps, and what the grid's levels do not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.sampling import dpm_adaptive, make_grid

SCHEDULE = make_schedule(ScheduleConfig())
X = 14.6 * torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VARIANCES = torch.tensor([0.2, 0.7, 2.5], dtype=torch.float64)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.reshape(-1, 1, 1, 1)
    return torch.tanh(x.roll(1, dims=-1) / (1 + level**2).sqrt() + x.mean(dim=(1, 2, 3), keepdim=True))


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact one of data of `VARIANCES` along the last axis."""
    return x * VARIANCES / (VARIANCES + sigma.reshape(-1, 1, 1, 1) ** 2)


def written_out(
    x: Tensor, begin: float, end: float, order: int, coefficients: tuple[float, ...], counted: list
) -> Tensor:
    """One picture by Lu et al. 2022, algorithms 1, 2 and appendix C, with k-diffusion's constants and controller."""
    p, i, d, safety = coefficients
    s, t_end, h_next = -math.log(begin), -math.log(end), 0.05
    inverse: list[float] = []
    lower_before = x

    def eps(x: Tensor, t: float) -> Tensor:
        counted.append(t)
        sigma = torch.tensor(math.exp(-t), dtype=torch.float64)
        return (x - denoiser(x, sigma)) / sigma

    while s < t_end - 1e-5:
        t = min(t_end, s + h_next)
        h, sigma_t = t - s, math.exp(-t)
        e = eps(x, s)
        if order == 2:
            middle = x - math.exp(-(s + h / 2)) * math.expm1(h / 2) * e
            low = x - sigma_t * math.expm1(h) * e
            high = low - sigma_t * math.expm1(h) * (eps(middle, s + h / 2) - e)
        else:
            third, two = s + h / 3, s + 2 * h / 3
            e1 = eps(x - math.exp(-third) * math.expm1(h / 3) * e, third)
            low = x - sigma_t * math.expm1(h) * (e + 1.5 * (e1 - e))
            at_two = x - math.exp(-two) * math.expm1(2 * h / 3) * e
            at_two = at_two - math.exp(-two) * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * (e1 - e)
            e2 = eps(at_two, two)
            high = x - sigma_t * (math.expm1(h) * e + 1.5 * (math.expm1(h) / h - 1) * (e2 - e))
        delta = torch.maximum(torch.tensor(0.0078), 0.05 * torch.maximum(low.abs(), lower_before.abs()))
        error = float(((low - high) / delta).norm() / math.sqrt(x.numel()))
        now = 1 / (error + 1e-8)
        inverse = [now, *(inverse[1:] if inverse else [now, now])]
        factor = inverse[0] ** ((p + i + d) / order) * inverse[1] ** (-(p + 2 * d) / order) * inverse[2] ** (d / order)
        factor = 1 + math.atan(factor - 1)
        h_next *= factor
        if factor >= safety:
            inverse = [inverse[0], inverse[0], inverse[1]]
            lower_before, x, s = low, high, t
    return x


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("coefficients", [(0.0, 1.0, 0.0, 0.81), (0.3, 0.5, 0.1, 0.95)])
def test_it_is_its_algorithm(order: int, coefficients: tuple[float, float, float, float]) -> None:
    """Each picture as if it were alone; where they differ in what they need, one waits for another."""
    sigmas = torch.tensor([14.6, 0.03], dtype=torch.float64)
    x, counts = X * torch.tensor([1.0, 0.2, 3.0]).view(3, 1, 1, 1), []
    wanted = []
    for row in range(3):
        counts.append([])
        wanted.append(written_out(x[row : row + 1], 14.6, 0.03, order, coefficients, counts[-1]))
    p, i, d, safety = coefficients
    calls: list[Tensor] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return denoiser(x, sigma)

    sampler = dpm_adaptive(order, pcoeff=p, icoeff=i, dcoeff=d, accept_safety=safety)
    *_, last = sampler(counted, x, sigmas, pytest.fail)  # type: ignore[arg-type]
    torch.testing.assert_close(last.x, torch.cat(wanted), rtol=0, atol=1e-9)
    assert len(calls) == max(map(len, counts)) and len({len(each) for each in counts}) > 1


def test_the_levels_between_are_looks() -> None:
    """They change neither the end nor the cost, and what is seen at them is on the way there."""
    ends, calls = [], []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return gaussian(x, sigma)

    for steps in (1, 7, 40):
        sigmas = make_grid(SCHEDULE, steps, "logsnr")
        begin = len(calls)
        walked = list(dpm_adaptive()(counted, X, sigmas, pytest.fail))  # type: ignore[arg-type]
        ends.append((walked[-1].x, len(calls) - begin))
        assert [step.sigma_next for step in walked] == sigmas[1:].tolist()
        for step in walked:
            exact = X * ((VARIANCES + step.sigma_next**2) / (VARIANCES + float(sigmas[0]) ** 2)).sqrt()
            assert float((step.x - exact).abs().max() / exact.abs().max()) < 0.05
    assert all(count == ends[0][1] for _, count in ends)
    for end, _ in ends:
        torch.testing.assert_close(end, ends[0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_error_follows_the_tolerance(order: int) -> None:
    """On an exact denoiser: a step's error is of order p + 1 and allowed to be tol, so the end's falls as tol does."""
    sigmas = torch.tensor([14.6, 0.03], dtype=torch.float64)
    exact = X * ((VARIANCES + 0.03**2) / (VARIANCES + 14.6**2)).sqrt()
    errors, counts = [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        calls: list[Tensor] = []

        def counted(x: Tensor, sigma: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(sigma)
            return gaussian(x, sigma)

        *_, last = dpm_adaptive(order, tolerance, tolerance)(counted, X, sigmas, pytest.fail)  # type: ignore[arg-type]
        errors.append(float((last.x - exact).square().mean().sqrt()))
        counts.append(len(calls))
    assert all(fine < coarse / 4 for coarse, fine in pairwise(errors)), errors
    # The lower order's local error is of order h^p, so ten times finer takes 10^(1/p) as many steps.
    assert counts[-1] / counts[-2] == pytest.approx(10 ** (1 / order), rel=0.2), counts
    assert errors[-1] < 1e-4


def test_it_begins_where_a_strength_says_and_ends_at_x0() -> None:
    sigmas = torch.tensor([2.0, 1.0, 0.05, 0.0], dtype=torch.float64)
    *_, before, last = dpm_adaptive()(denoiser, X, sigmas, pytest.fail)  # type: ignore[arg-type]
    assert torch.equal(last.x, denoiser(before.x, sigmas[2])) and before.sigma_next == 0.05


def test_what_cannot_go_on_is_said() -> None:
    sigmas = torch.tensor([14.6, 1.0], dtype=torch.float64)
    broken: Callable[[Tensor, Tensor], Tensor]
    broken = lambda x, sigma: torch.where(sigma.reshape(-1, 1, 1, 1) < 5, math.nan, 0.0) * x  # noqa: E731
    with pytest.raises(UserError, match=r"dpm_adaptive cannot go on at sigma \d.*not finite"):
        list(dpm_adaptive()(broken, X, sigmas, pytest.fail))  # type: ignore[arg-type]
    anything: Callable[[Tensor, Tensor], Tensor] = lambda x, sigma: torch.randn_like(x)  # noqa: E731
    with pytest.raises(UserError, match="larger tolerances"):
        list(dpm_adaptive(atol=1e-13, rtol=1e-13)(anything, X, sigmas, pytest.fail))  # type: ignore[arg-type]
    huge: Callable[[Tensor, Tensor], Tensor] = lambda x, sigma: 1e200 * torch.randn_like(x)  # noqa: E731
    with pytest.raises(UserError, match="dpm_adaptive cannot go on"):  # nor with an error that is infinite
        list(dpm_adaptive(pcoeff=1.0, dcoeff=1.0)(huge, X, sigmas, pytest.fail))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 1}, "order of dpm_adaptive is 1"),
        ({"rtol": 0.0}, "rtol of dpm_adaptive is 0"),
        ({"atol": math.nan}, "atol of dpm_adaptive is nan"),
        ({"h_init": -0.1}, "h_init of dpm_adaptive"),
        ({"dcoeff": -1.0}, "dcoeff of dpm_adaptive is -1"),
        ({"pcoeff": 200.0}, "pcoeff of dpm_adaptive is 200"),
        ({"accept_safety": 1.5}, "accept_safety of dpm_adaptive is 1.5"),
    ],
)
def test_nonsense_is_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dpm_adaptive(**options)
