"""How fast the deterministic samplers converge to the probability flow, measured in float64.

Sampler and reference both go from sigma_max to sigma = 0.03 on geometric grids, from the same states, so that nothing
but the solver errs; the step to 0, which is D for all of them, is no part of it. On a Gaussian the flow is known in
closed form, on a mixture it is integrated by the classical Runge-Kutta method in 800 steps. `pytest -n 0 -s` prints the
tables.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.sampling import (
    Sampler,
    ddim,
    deis,
    dpm_2,
    dpm_fast,
    dpmpp_2m,
    euler,
    gradient_estimation,
    heun,
    ipndm,
    lms,
    make_grid,
    ode,
    plms,
    res_multistep,
    unipc,
)
from ldm.sampling.step import LEAP

from .closed_forms import Gaussian, Mixture, three_clusters, three_dimensional

SAMPLERS: dict[str, tuple[Sampler, float]] = {
    "ddim": (ddim(), 0.9),
    "euler": (euler(), 0.9),
    "heun": (heun(), 1.8),
    "dpm_2": (dpm_2(), 1.8),
    "plms": (plms(), 1.8),
    "dpmpp_2m": (dpmpp_2m(), 1.8),
    "unipc 1": (unipc(1), 1.8),
    "unipc": (unipc(), 2.7),
    "unipc bh1": (unipc(2, "bh1"), 2.7),
    "unipc 3": (unipc(3), 3.3),
    "lms 2": (lms(2), 1.8),
    "lms 3": (lms(3), 2.5),
    "lms": (lms(), 3),
    "deis": (deis(), 1.8),
    "deis 3": (deis(3), 2.3),
    "res_multistep": (res_multistep(), 1.8),
    "res_multistep 3": (res_multistep(3), 1.9),
    "ipndm": (ipndm(), 1.8),
    "gradient_estimation": (gradient_estimation(), 0.8),
    "dpm_fast": (dpm_fast(), 2.7),
}
"""The order that each must at least show. UniPC's is one more than what it is asked for, by its corrector. Those of
higher order are held back by their first steps here, and show it from further up (tests/sampling/test_multistep.py)."""

STEPS = (12, 24, 48, 96, 192)
LAST = 0.03
SCHEDULE = make_schedule(ScheduleConfig())


def line() -> Gaussian:
    return Gaussian(torch.tensor([0.5], dtype=torch.float64), torch.tensor([[0.6]], dtype=torch.float64))


def many() -> Mixture:
    """Five clusters in 64 dimensions, deviation 0.3, distances about 1.3 to 1.9 from each other."""
    means = torch.randn(5, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.15
    return Mixture(torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64), means, 0.3)


LAWS = {
    "Gaussian, 1-d": line(),
    "Gaussian, 3-d": three_dimensional(),
    "mixture, 2-d": three_clusters(),
    "mixture, 64-d": many(),
}


def dimension(data: Gaussian | Mixture) -> int:
    return len(data.mean) if isinstance(data, Gaussian) else data.means.shape[1]


@cache
def begin(law: str, sigma: float) -> Tensor:
    """(8, 1, 1, d) states of pure noise at `sigma`."""
    generator = torch.Generator().manual_seed(1)
    return sigma * torch.randn(8, 1, 1, dimension(LAWS[law]), generator=generator, dtype=torch.float64)


def gaussian_flow(data: Gaussian, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """mean + sqrt((C + r^2) (C + s^2)^-1) (x - mean): each eigendirection keeps its quantile."""
    values, vectors = torch.linalg.eigh(data.covariance)
    factor = ((values + sigma_next**2) / (values + sigma**2)).sqrt()
    return data.mean + (x - data.mean) @ (vectors @ torch.diag(factor) @ vectors.T)


def runge_kutta(data: Mixture, x: Tensor, sigma: float, sigma_next: float, steps: int = 800) -> Tensor:
    """The classical method on dx / dl = x - D(x, e^l), l = log sigma."""
    h = math.log(sigma_next / sigma) / steps

    def slope(x: Tensor, level: float) -> Tensor:
        return x - data.denoiser(x, torch.tensor(math.exp(level), dtype=torch.float64))

    for index in range(steps):
        now = math.log(sigma) + index * h
        a = slope(x, now)
        b = slope(x + h / 2 * a, now + h / 2)
        c = slope(x + h / 2 * b, now + h / 2)
        d = slope(x + h * c, now + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@cache
def exact(law: str, sigma: float, sigma_next: float) -> Tensor:
    data = LAWS[law]
    flow = gaussian_flow if isinstance(data, Gaussian) else runge_kutta
    return flow(data, begin(law, sigma), sigma, sigma_next)  # type: ignore[arg-type]


def geometric(steps: int, sigma: float = SCHEDULE.sigma_max, sigma_next: float = LAST) -> Tensor:
    return torch.linspace(math.log(sigma), math.log(sigma_next), steps + 1, dtype=torch.float64).exp()


def error(sampler: Sampler, law: str, sigmas: Tensor) -> float:
    """Root mean square over states and coordinates, at the grid's last level."""
    first, last = float(sigmas[0]), float(sigmas[-1])
    *_, step = sampler(LAWS[law].denoiser, begin(law, first), sigmas, pytest.fail)  # type: ignore[arg-type]
    return float((step.x - exact(law, first, last)).square().mean().sqrt())


def slope(errors: list[float]) -> float:
    """Of the line through log error against log steps, by least squares; an order is its negative."""
    points = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(STEPS, errors, strict=True)], dtype=torch.float64)
    x, y = (points - points.mean(dim=0)).T
    return -float((x * y).sum() / (x * x).sum())


@cache
def order_table(law: str) -> dict[str, tuple[float, list[float]]]:
    """Sampler -> (order, the errors at `STEPS`)."""
    grids = [geometric(steps) for steps in STEPS]
    rows = {name: [error(sampler, law, sigmas) for sigmas in grids] for name, (sampler, _) in SAMPLERS.items()}
    return {name: (slope(errors), errors) for name, errors in rows.items()}


def printed(law: str) -> str:
    lines = [f"{law:14}  order" + "".join(f"{f'N = {steps}':>10}" for steps in STEPS)]
    for name, (order, errors) in order_table(law).items():
        lines.append(f"{name:14}  {order:5.2f}" + "".join(f"{value:10.1e}" for value in errors))
    return "\n".join(lines)


@pytest.mark.parametrize("law", LAWS)
def test_the_order_of_convergence(law: str) -> None:
    """Over four halvings of the step."""
    print("\n" + printed(law))
    for name, (order, errors) in order_table(law).items():
        assert order >= SAMPLERS[name][1], (name, order, errors)
        assert all(fine < coarse for coarse, fine in pairwise(errors)), (name, errors)
    first = {order_table(law)[name][0] for name in ("ddim", "euler")}
    assert max(first) < 1.2, "a measure that gives Euler more than 1 measures something else"


@pytest.mark.parametrize("law", LAWS)
def test_the_adaptive_solver_keeps_its_tolerance(law: str) -> None:
    data, few = LAWS[law], 2  # states

    def by_row(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([data.denoiser(x[row : row + 1], sigma[row]) for row in range(len(x))])

    sigmas = geometric(3)
    x, wanted = begin(law, SCHEDULE.sigma_max)[:few], exact(law, SCHEDULE.sigma_max, float(sigmas[-1]))[:few]
    for tolerance in (1e-4, 1e-6):
        *_, step = ode(tolerance, tolerance)(by_row, x, sigmas, pytest.fail)  # type: ignore[arg-type]
        assert float((step.x - wanted).square().mean().sqrt()) < 10 * tolerance


def test_the_reference_is_the_flow() -> None:
    """Runge-Kutta on a mixture of one cluster, which is a Gaussian, against the closed form."""
    data = Mixture(torch.ones(1, dtype=torch.float64), torch.tensor([[0.3, -0.7]], dtype=torch.float64), 0.5)
    same = Gaussian(data.means[0], 0.25 * torch.eye(2, dtype=torch.float64))
    x = SCHEDULE.sigma_max * torch.randn(4, 1, 1, 2, dtype=torch.float64)
    found = runge_kutta(data, x, SCHEDULE.sigma_max, LAST)
    torch.testing.assert_close(found, gaussian_flow(same, x, SCHEDULE.sigma_max, LAST), rtol=0, atol=1e-9)


PURE_NOISE = {
    "zero terminal SNR": make_schedule(ScheduleConfig(zero_terminal_snr=True)),
    "cosine": make_schedule(ScheduleConfig(kind="cosine")),
}


@cache
def grid_from_pure_noise(schedule: str, spacing: str) -> Tensor:
    sigmas = make_grid(PURE_NOISE[schedule], 40, spacing)
    return sigmas[sigmas > 0]


@cache
def eulers_error(law: str, schedule: str, spacing: str) -> float:
    return error(euler(), law, grid_from_pure_noise(schedule, spacing))


@pytest.mark.parametrize(
    ("law", "schedule", "spacing"),
    [
        ("Gaussian, 3-d", "zero terminal SNR", "trailing"),
        ("Gaussian, 3-d", "zero terminal SNR", "karras"),
        ("Gaussian, 3-d", "cosine", "trailing"),
        ("Gaussian, 3-d", "cosine", "logsnr"),
        ("mixture, 2-d", "zero terminal SNR", "trailing"),
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_pure_noise(name: str, law: str, schedule: str, spacing: str) -> None:
    """From sigma = 1e6 or 2e4, where the first step divides sigma by a hundred to ten thousand: a leap.

    The trapezoid or midpoint in sigma would multiply what D changes on the way by as much; here each stays well below
    Euler's error, at the last level above 0.
    """
    sampler, order = SAMPLERS[name]
    sigmas = grid_from_pure_noise(schedule, spacing)
    assert float(sigmas[0] / sigmas[1]) > LEAP
    assert error(sampler, law, sigmas) <= eulers_error(law, schedule, spacing) * (0.6 if order > 1 else 1.0)
