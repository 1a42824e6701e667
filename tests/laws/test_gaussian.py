"""The output law of every stochastic sampler on Gaussian data, exactly, and the order at which it nears the data's.

The map is read off the sampler with unit vectors (affine.py). Those that are DDIM or DDPM are compared with a recursion
written in the chain's coordinates from the papers (Ho et al. 2020, algorithm 2; Song et al. 2021, equations 12 and 16),
and all with the data's law. Orders are those of the error in law ("weak"): the covariance's, since where x itself is
stepped the data's mean is a fixed point of every step.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_schedule
from ldm.sampling import (
    ddim,
    ddpm,
    dpm_2_a,
    dpmpp_2m_sde,
    dpmpp_2s_a,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler_a,
    euler_maruyama,
    heun,
    lcm,
    make_grid,
    pc,
    restart,
)

from .affine import geometric, noised, output_law, slopes
from .closed_forms import Gaussian, three_dimensional

SCHEDULE = make_schedule(ScheduleConfig())
CHAIN = {
    "ddim": ddim(),
    "ddim eta 0.5": ddim(0.5),
    "ddim eta 1": ddim(1.0),
    "euler_a eta 0.5": euler_a(0.5),
    "euler_a eta 1": euler_a(),
    "ddpm posterior": ddpm("posterior"),
    "ddpm beta": ddpm("beta"),
}
FIRST_ORDER = CHAIN | {
    "ddpm learned": ddpm("learned", fraction=lambda x, sigma: torch.full_like(x, 0.3)),
    "euler_maruyama": euler_maruyama(SCHEDULE),
    "pc's predictor": pc(moves=0),
    "dpm_2_a": dpm_2_a(),
    "dpmpp_2s_a": dpmpp_2s_a(),
    "dpmpp_2s_a eta 0.5": dpmpp_2s_a(0.5),
}
SECOND_ORDER = {
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "dpmpp_2m_sde eta 0.5": dpmpp_2m_sde(0.5),
    "dpmpp_2m_sde heun": dpmpp_2m_sde(solver="heun"),
    "dpmpp_3m_sde": dpmpp_3m_sde(),
    "dpmpp_sde": dpmpp_sde(),
    "dpmpp_sde eta 0.5": dpmpp_sde(0.5),
}


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
        if name.startswith(("ddim", "euler_a")):
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


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_output_law_is_that_of_the_recursion(name: str, spacing: str) -> None:
    """From pure noise, as in use, on each grid: mean and covariance to 1e-10."""
    data, sigmas = three_dimensional(), make_grid(SCHEDULE, 20, spacing)
    start = Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64) * (1 + sigmas[0] ** 2))
    found = output_law(CHAIN[name], data, sigmas, start.mean, start.covariance)
    expected = recursion(name, SCHEDULE, data, sigmas, start)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-10)


def errors_from(sampler, data: Gaussian, highest: float, lowest: float, counts, kind: str = "path") -> list[float]:
    """Of the output's covariance after each number of geometric steps, sampler and data both from `highest`.

    Started from the data's own law there, whatever is wrong at the end is the sampler's doing.
    """
    start, wanted = noised(data, highest), noised(data, lowest)
    errors = []
    for steps in counts:
        sigmas = geometric(highest, lowest, steps)
        found = output_law(sampler, data, sigmas, start.mean, start.covariance, kind)
        errors.append(float((found.covariance - wanted.covariance).norm()))
    return errors


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_the_error_falls_at_first_order(name: str) -> None:
    """From sigma_max to 0.03; slope >= 0.9 over four halvings."""
    errors = errors_from(FIRST_ORDER[name], three_dimensional(), SCHEDULE.sigma_max, 0.03, (16, 32, 64, 128, 256))
    assert sum(slopes(errors)) / 4 >= 0.9, (errors, slopes(errors))
    assert errors[-1] < 0.07


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_error_falls_at_second_order(name: str) -> None:
    """The same with slope >= 1.9: the noise is integrated exactly, and D's change within a step to its first order."""
    errors = errors_from(SECOND_ORDER[name], three_dimensional(), SCHEDULE.sigma_max, 0.03, (16, 32, 64, 128))
    assert sum(slopes(errors)) / 3 >= 1.9 and slopes(errors)[-1] >= 1.9, (errors, slopes(errors))
    assert errors[-1] < 0.005


def test_two_noises_of_a_step_belong_together() -> None:
    """dpmpp_sde's are over [s, middle] and [s, r]: drawn independently they leave it at order 1, forty times as far."""
    counts = (16, 32, 64, 128)
    together = errors_from(dpmpp_sde(), three_dimensional(), SCHEDULE.sigma_max, 0.03, counts)
    apart = errors_from(dpmpp_sde(), three_dimensional(), SCHEDULE.sigma_max, 0.03, counts, "stream")
    assert slopes(apart)[-1] < 1.1 and apart[-1] > 40 * together[-1], (apart, together)


def test_heun_with_churn_is_of_second_order() -> None:
    """The churn of a step, s_churn / N, falls as the steps grow. 10 % too little noise is an error that stays: with
    128 steps it is more than twenty times as large."""
    counts, data = (16, 32, 64, 128), three_dimensional()
    errors = errors_from(heun(s_churn=20.0), data, SCHEDULE.sigma_max, 0.03, counts, "stream")
    assert sum(slopes(errors)) / 3 >= 1.5 and slopes(errors)[-1] >= 1.8 and errors[-1] < 0.02, (errors, slopes(errors))
    (starved,) = errors_from(heun(s_churn=20.0, s_noise=0.9), data, SCHEDULE.sigma_max, 0.03, counts[-1:], "stream")
    assert starved > 20 * errors[-1]


def test_restart_is_of_second_order_and_forgets_a_wrong_start() -> None:
    """A start of twice the covariance, at sigma 3: Heun carries it to the end, where twice the walk from 2 to 0.1 under
    fresh noise leaves less than a sixth of it."""
    data, sampler = three_dimensional(), restart(1, 0.1, 2.0)
    errors = errors_from(sampler, data, SCHEDULE.sigma_max, 0.03, (16, 32, 64, 128), "stream")
    assert slopes(errors)[-1] >= 1.5 and errors[-1] < 0.02, (errors, slopes(errors))
    wanted, start, sigmas = noised(data, 0.03), noised(data, 3.0), geometric(3.0, 0.03, 64)
    off = [
        float(
            (
                output_law(one, data, sigmas, start.mean, 2 * start.covariance, "stream").covariance - wanted.covariance
            ).norm()
        )
        for one in (heun(), restart(2, 0.1, 2.0))
    ]
    assert off[1] < off[0] / 6, off


def test_without_noise_the_parabola_is_of_third_order() -> None:
    """From far above the data, where the first two steps, of lower order, do no harm. Half the curvature gives 2.1."""
    errors = errors_from(dpmpp_3m_sde(0.0), three_dimensional(), 1e4, 0.3, (32, 64, 128, 256))
    assert sum(slopes(errors)) / 3 >= 2.9, (errors, slopes(errors))


@pytest.mark.parametrize("name", FIRST_ORDER | SECOND_ORDER)
def test_the_mean_is_kept(name: str) -> None:
    """Exactly, but for euler_maruyama: it steps z = alpha x, whose mean moves, and is wrong by a term of order 1."""
    data = three_dimensional()
    start, off = noised(data, SCHEDULE.sigma_max), []
    for steps in (12, 24):
        sigmas = geometric(SCHEDULE.sigma_max, 0.03, steps)
        found = output_law((FIRST_ORDER | SECOND_ORDER)[name], data, sigmas, start.mean, start.covariance)
        off.append(float((found.mean - data.mean).norm()))
    if name == "euler_maruyama":
        assert off[1] < 0.6 * off[0]
    else:
        assert max(off) < 1e-10


@pytest.mark.parametrize("name", FIRST_ORDER | SECOND_ORDER)
def test_from_pure_noise_to_the_data(name: str) -> None:
    """As in use: pure noise, trailing grid, down to 0: ten times the steps, a sixth of the covariance's error or less.

    Where 10 steps are that good already, half a percent: the start, which is not the data's law at sigma_max, shows.
    """
    sampler, data = (FIRST_ORDER | SECOND_ORDER)[name], three_dimensional()
    errors = []
    for steps in (10, 100):
        sigmas = make_grid(SCHEDULE, steps, "trailing")
        start = torch.eye(3, dtype=torch.float64) * (1 + sigmas[0] ** 2)
        found = output_law(sampler, data, sigmas, torch.zeros(3, dtype=torch.float64), start)
        errors.append(float((found.covariance - data.covariance).norm() / data.covariance.norm()))
    assert errors[1] < 0.05 and (errors[1] < errors[0] / 6 or errors[1] < 0.005), errors


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_euler_maruyama_on_other_laws(kind: str) -> None:
    """In continuous time, from sigma = 12 to 0.5, evenly in the law's time."""
    schedule, data = make_schedule(ScheduleConfig(kind=kind)), three_dimensional()
    start, wanted, errors = noised(data, 12.0), noised(data, 0.5), []
    ends = schedule.t(torch.tensor([12.0, 0.5], dtype=torch.float64)).tolist()
    for steps in (40, 80, 160):
        sigmas = schedule.sigma(torch.linspace(*ends, steps + 1, dtype=torch.float64))
        found = output_law(euler_maruyama(schedule), data, sigmas, start.mean, start.covariance)
        errors.append(float((found.covariance - wanted.covariance).norm()))
    assert sum(slopes(errors)) / 2 >= 0.9 and errors[-1] < 0.1, (errors, slopes(errors))


def consistency(data: Gaussian):
    """The end point of the probability flow through x: mean + sqrt(C (C + sigma^2)^-1) (x - mean)."""
    values, vectors = torch.linalg.eigh(data.covariance)

    def end_point(x: Tensor, sigma: Tensor) -> Tensor:
        flow = vectors @ torch.diag((values / (values + float(sigma) ** 2)).sqrt()) @ vectors.T
        return data.mean + (x - data.mean) @ flow.T

    return end_point


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_consistency_function_gives_the_data_in_any_number_of_steps(steps: int) -> None:
    """Exactly: each step maps the law at s to the data's, and noise of deviation r to the law at r."""
    data = three_dimensional()

    class Consistent(Gaussian):
        denoiser = staticmethod(consistency(data))  # type: ignore[assignment]

    for lowest in (0.0, 0.2):
        sigmas = torch.tensor([*torch.linspace(9.0, 0.5, steps).tolist(), lowest], dtype=torch.float64)
        start, wanted = noised(data, 9.0), noised(data, lowest)
        found = output_law(lcm(), Consistent(data.mean, data.covariance), sigmas, start.mean, start.covariance)
        torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.covariance, wanted.covariance, rtol=0, atol=1e-12)


def test_a_mean_in_place_of_a_consistency_function_loses_variance() -> None:
    """With D the output's covariance is that of D, C (C + sigma^2)^-1 C at the last level, and not the data's."""
    data, sigmas = three_dimensional(), torch.tensor([9.0, 0.7, 0.0], dtype=torch.float64)
    start = noised(data, 9.0)
    found = output_law(lcm(), data, sigmas, start.mean, start.covariance)
    first = data.gain(9.0) @ start.covariance @ data.gain(9.0).T
    second = data.gain(0.7) @ (first + 0.49 * torch.eye(3, dtype=torch.float64)) @ data.gain(0.7).T
    torch.testing.assert_close(found.covariance, second, rtol=0, atol=1e-12)
    assert float(found.covariance.trace()) < 0.7 * float(data.covariance.trace())


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
