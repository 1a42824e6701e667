"""On Gaussian data every sampler is an affine map of its start and its noise, so its output law is exact, not drawn.

The map is read off the sampler with unit vectors. Its mean and covariance are compared with a recursion written in the
chain's coordinates from the papers (Ho et al. 2020, algorithm 2; Song et al. 2021, equations 12 and 16), and with the
data's law, to which they must converge at order 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_schedule
from ldm.sampling import Sampler, ddim, ddpm, make_grid

from .closed_forms import Gaussian, three_dimensional

SAMPLERS = {
    "ddim": ddim(),
    "ddim eta 0.5": ddim(0.5),
    "ddim eta 1": ddim(1.0),
    "ddpm posterior": ddpm("posterior"),
    "ddpm beta": ddpm("beta"),
}
SCHEDULE = make_schedule(ScheduleConfig())


def output_law(sampler: Sampler, data: Gaussian, sigmas: Tensor, mean: Tensor, covariance: Tensor) -> Gaussian:
    """The law of the sampler's last state, started from N(mean, covariance), by feeding it unit vectors.

    One batch: row 0 is the origin, then a row for each coordinate of the start and of each step's noise.
    """
    d, N = len(data.mean), len(sigmas) - 1
    rows = 1 + d + N * d
    unit = torch.eye(rows, dtype=torch.float64)[:, 1:]  # row 0 is 0
    calls = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        calls.append(sigma)
        return unit[:, len(calls) * d : (len(calls) + 1) * d].reshape(rows, 1, 1, d)

    for step in sampler(data.denoiser, unit[:, :d].reshape(rows, 1, 1, d), sigmas, noise):
        last = step.x.reshape(rows, d)
    columns = (last[1:] - last[0]).T
    of_start, of_noise = columns[:, :d], columns[:, d:]
    return Gaussian(last[0] + of_start @ mean, of_start @ covariance @ of_start.T + of_noise @ of_noise.T)


def recursion(name: str, schedule: Schedule, data: Gaussian, sigmas: Tensor, start: Gaussian) -> Gaussian:
    """The same law for z = alpha x, step by step, from the papers' formulas with eps and alpha_bar."""
    one = torch.eye(len(data.mean), dtype=torch.float64)
    alphas_bar = [1 / (1 + float(sigma) ** 2) for sigma in sigmas]
    mean, covariance = start.mean * math.sqrt(alphas_bar[0]), start.covariance * alphas_bar[0]
    for now, then in pairwise(alphas_bar):
        # E[eps | z] = E (z - sqrt(now) mean) on Gaussian data, z having covariance now C + (1 - now)
        E = math.sqrt(1 - now) * torch.linalg.inv(now * data.covariance + (1 - now) * one)
        e = -E @ data.mean * math.sqrt(now)
        alpha = now / then
        tilde = (1 - then) / (1 - now) * (1 - alpha)
        if name.startswith("ddim"):
            eta = float(name.split()[-1]) if "eta" in name else 0.0
            variance = eta**2 * tilde
            ratio, rest = math.sqrt(then / now), math.sqrt(1 - then - variance)
            A = ratio * (one - math.sqrt(1 - now) * E) + rest * E
            b = (rest - ratio * math.sqrt(1 - now)) * e
        else:
            variance = tilde if name == "ddpm posterior" or then == 1 else 1 - alpha
            A = (one - (1 - alpha) / math.sqrt(1 - now) * E) / math.sqrt(alpha)
            b = -(1 - alpha) / math.sqrt(1 - now) / math.sqrt(alpha) * e
        mean, covariance = A @ mean + b, A @ covariance @ A.T + variance * one
    return Gaussian(mean / math.sqrt(alphas_bar[-1]), covariance / alphas_bar[-1])


def noised(data: Gaussian, sigma: float) -> Gaussian:
    return Gaussian(data.mean, data.covariance + sigma**2 * torch.eye(len(data.mean), dtype=torch.float64))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_output_law_is_that_of_the_recursion(name: str, spacing: str) -> None:
    """From pure noise, as in use, on each grid: mean and covariance to 1e-10."""
    data, sigmas = three_dimensional(), make_grid(SCHEDULE, 20, spacing)
    start = Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64) * (1 + sigmas[0] ** 2))
    found = output_law(SAMPLERS[name], data, sigmas, start.mean, start.covariance)
    expected = recursion(name, SCHEDULE, data, sigmas, start)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_error_falls_at_first_order(name: str) -> None:
    """Sampler and data both from sigma_max to 0.03 on geometric grids of 16 to 256 steps; slope >= 0.9.

    Started from the data's own law at sigma_max, whatever is wrong at the end is the sampler's doing.
    """
    data = three_dimensional()
    start, wanted = noised(data, SCHEDULE.sigma_max), noised(data, 0.03)
    errors = []
    for steps in (16, 32, 64, 128, 256):
        ends = math.log(SCHEDULE.sigma_max), math.log(0.03)
        sigmas = torch.linspace(*ends, steps + 1, dtype=torch.float64).exp()
        found = output_law(SAMPLERS[name], data, sigmas, start.mean, start.covariance)
        errors.append(float((found.covariance - wanted.covariance).norm()))
        assert (found.mean - wanted.mean).norm() < 1e-10, "the data's mean is a fixed point of every step"
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert sum(slopes) / len(slopes) >= 0.9, (errors, slopes)
    assert errors[-1] < 0.07


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_pure_noise_to_the_data(name: str) -> None:
    """As in use: pure noise, trailing grid, down to 0: ten times the steps, about a tenth of the covariance's error."""
    data = three_dimensional()
    errors = []
    for steps in (10, 100):
        sigmas = make_grid(SCHEDULE, steps, "trailing")
        start = torch.eye(3, dtype=torch.float64) * (1 + sigmas[0] ** 2)
        found = output_law(SAMPLERS[name], data, sigmas, torch.zeros(3, dtype=torch.float64), start)
        errors.append(float((found.covariance - data.covariance).norm() / data.covariance.norm()))
    assert errors[1] < errors[0] / 6 and errors[1] < 0.05, errors


def test_where_the_start_differs_from_the_data() -> None:
    """The start z = n lacks the data's mean and covariance: the ODE carries that to the end in closed form.

    DDIM with many steps maps x to mean + sqrt(C (C + sigma_max^2)^-1) (x - mean), so from zero mean the output's mean
    is off by the factor sqrt(c / (c + sigma_max^2)) in each eigendirection, 10 % for a deviation of 1.5.
    """
    data, sigmas = three_dimensional(), make_grid(SCHEDULE, 1000, "trailing")
    values, vectors = torch.linalg.eigh(data.covariance)
    flow = vectors @ torch.diag((values / (values + SCHEDULE.sigma_max**2)).sqrt()) @ vectors.T
    x = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    *_, last = ddim()(data.denoiser, x, sigmas, pytest.fail)  # type: ignore[arg-type]
    torch.testing.assert_close(last.x.flatten(), data.mean - flow @ data.mean, rtol=0, atol=2e-3)
