"""Likelihoods on laws whose density is known: the entropy of a Gaussian, the density of a mixture at points.

On a Gaussian every term is quadratic in the data and the noise, so its expectation is exact, not drawn: the twelve
points of `design` have the mean and covariance of (x0, n), which is all that a quadratic sees.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_schedule
from ldm.diffusion.likelihood import (
    bound,
    density_bits,
    flow_log_density,
    optimal_variance,
)
from ldm.sampling import make_grid

from .closed_forms import Gaussian, three_clusters, three_dimensional

SCHEDULE = make_schedule(ScheduleConfig())
GRID = make_grid(SCHEDULE, SCHEDULE.steps)
START = float(SCHEDULE.start_scale(SCHEDULE.sigmas[-1]))
DATA = three_dimensional()
WITHIN = 0.01  # bits per dimension


def entropy(covariance: Tensor) -> float:
    """Of a Gaussian, in bits per dimension."""
    d = len(covariance)
    return 0.5 * math.log2(2 * math.pi * math.e) + float(torch.logdet(covariance)) / (2 * d * math.log(2))


def design(data: Gaussian) -> tuple[Tensor, Tensor]:
    """(x0, n), each (4 d, 1, 1, d): points in the 2 d directions of both, of mean 0 and covariance I before scaling."""
    d = len(data.mean)
    axes = math.sqrt(2 * d) * torch.eye(2 * d, dtype=torch.float64)
    points = torch.cat([axes, -axes])
    x0 = data.mean + points[:, :d] @ torch.linalg.cholesky(data.covariance).T
    return x0.reshape(-1, 1, 1, d), points[:, d:].reshape(-1, 1, 1, d)


def error(data: Gaussian, sigma: float) -> float:
    """E (x0 - D)^2 per dimension: the posterior's variance, C - C (C + sigma^2)^-1 C."""
    return float((data.covariance - data.gain(sigma) @ data.covariance).trace() / len(data.mean))


def start_of(schedule: Schedule) -> float:
    return float(schedule.start_scale(torch.tensor(schedule.sigma_max, dtype=torch.float64)))


@pytest.mark.parametrize("kind", ["flow", "ve"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_bound_on_laws_that_do_not_preserve_the_variance(kind: str, variance: str) -> None:
    """Prior and one step in z = a x0 + b n, by Bayes' rule there: a = 1 - t, b = t, or a = 1, b = sigma."""
    schedule, levels = make_schedule(ScheduleConfig(kind=kind)), (3.0, 0.8)
    x0, n = design(DATA)
    grid = torch.tensor([*levels, 0.0], dtype=torch.float64)
    found = bound(DATA.denoiser, x0, grid, schedule, lambda: n, variance=variance)
    (a, b), (a_next, b_next) = [(1 / (1 + s), s / (1 + s)) if kind == "flow" else (1.0, s) for s in levels]
    start = 1.0 if kind == "flow" else levels[0]
    square = float(DATA.mean.square().sum() + DATA.covariance.trace()) / len(DATA.mean)
    prior = 0.5 * ((a**2 * square + b**2) / start**2 - 1 - math.log(b**2 / start**2))
    added = b**2 - (a / a_next * b_next) ** 2  # the variance of z given z_next
    tilde = b_next**2 * added / b**2
    of_x0 = a_next - (a / a_next) * b_next**2 / b**2 * a  # x0's factor in the posterior's mean
    v = added if variance == "beta" else tilde
    step = 0.5 * (tilde / v - 1 - math.log(tilde / v) + of_x0**2 * error(DATA, levels[0]) / v)
    assert float(found.prior.mean()) == pytest.approx(prior / math.log(2), abs=1e-9)
    assert float(found.steps.sum(1).mean()) == pytest.approx(step / math.log(2), abs=1e-9)


def expected_bound(variance: str) -> Tensor:
    """(prior, all steps, decoder) in bits per dimension, in the chain's coordinates and from the papers' formulas.

    Ho et al. 2020: L_T is the KL to N(0, I); L_{t-1} of equations 6 and 7; beta-tilde of t = 2 stands in at t = 1.
    """
    alphas_bar = [1.0, *SCHEDULE.alphas_cumprod.tolist()]  # alphas_bar[t], t = 0 .. T
    last, d = alphas_bar[-1], len(DATA.mean)
    square = float(DATA.mean.square().sum() + DATA.covariance.trace()) / d
    prior = 0.5 * (last * square + (1 - last) - 1 - math.log(1 - last))
    steps, decoder, second = 0.0, 0.0, 0.0
    for t, (before, now) in enumerate(pairwise(alphas_bar), start=1):
        beta = 1 - now / before
        tilde = (1 - before) / (1 - now) * beta
        second = tilde if t == 2 else second
        of_x0 = math.sqrt(before) * beta / (1 - now)  # x0's factor in the posterior's mean
        off = of_x0**2 * error(DATA, math.sqrt((1 - now) / now))
        if t == 1:
            first_beta, first_off = beta, off
            continue
        v = beta if variance == "beta" else tilde
        steps += 0.5 * (tilde / v - 1 - math.log(tilde / v) + off / v)
    v = first_beta if variance == "beta" else second
    decoder = 0.5 * (math.log(2 * math.pi * v) + first_off / v)
    return torch.tensor([prior, steps, decoder], dtype=torch.float64) / math.log(2)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_each_part_of_the_bound_is_its_closed_form(variance: str) -> None:
    """And with beta it is the entropy to 0.01 bit, with the posterior's variance half a bit and more above it."""
    x0, n = design(DATA)
    found = bound(DATA.denoiser, x0, GRID, SCHEDULE, lambda: n, variance=variance)
    parts = torch.stack([found.prior.mean(), found.steps.sum(1).mean(), found.decoder.mean()])
    torch.testing.assert_close(parts, expected_bound(variance), rtol=0, atol=1e-9)
    gap = found.total.mean - entropy(DATA.covariance)
    assert 0 < gap < WITHIN if variance == "beta" else gap > 0.5


def test_the_analytically_optimal_variance_gives_the_smallest_bound() -> None:
    x0, n = design(DATA)
    errors = torch.tensor([error(DATA, float(sigma)) for sigma in GRID[:-1]])
    best = optimal_variance(GRID, errors)

    def total(variance: str | Tensor) -> float:
        return bound(DATA.denoiser, x0, GRID, SCHEDULE, lambda: n, variance=variance).total.mean

    found = total(best)
    assert 0 < found - entropy(DATA.covariance) < WITHIN
    assert found < min(total("beta"), total(best * 1.05), total(best / 1.05))


def test_on_unit_normal_data_the_beta_bound_is_the_entropy_on_any_grid() -> None:
    """beta is then the reverse step's true variance and the start law the true marginal: nothing is lost."""
    data = Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    x0, n = design(data)
    for steps in (1, 2, 7):
        found = bound(data.denoiser, x0, make_grid(SCHEDULE, steps), SCHEDULE, lambda: n, variance="beta")
        assert found.total.mean == pytest.approx(entropy(data.covariance), abs=1e-12)


def gaussian_points(data: Gaussian) -> Tensor:
    """(2 d, 1, 1, d) with the data's own mean and covariance."""
    reach = math.sqrt(len(data.mean)) * torch.linalg.cholesky(data.covariance).T
    return torch.cat([data.mean + reach, data.mean - reach])[:, None, None]


def flow_density(data: Gaussian, x: Tensor, schedule: Schedule = SCHEDULE) -> Tensor:
    """ln p (n,) at x (n, d) of what the flow makes of the start law: it maps x to mean + A (x - mean) at sigma_max."""
    values, vectors = torch.linalg.eigh(data.covariance)
    stretch = ((values + schedule.sigma_max**2) / (values + schedule.sigma_min**2)).sqrt()
    end = data.mean + (x - data.mean) @ (vectors * stretch) @ vectors.T
    start = torch.distributions.Normal(0.0, start_of(schedule))
    return start.log_prob(end).sum(1) + stretch.log().sum()


def test_the_flow_gives_the_density_and_the_entropy_of_a_gaussian() -> None:
    """At six points the closed form to 1e-4 nats, and over them, which is the exact expectation, the entropy."""
    x = gaussian_points(DATA)
    found = flow_log_density(DATA.denoiser, x, SCHEDULE.sigma_min, SCHEDULE.sigma_max, START, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_density, flow_density(DATA, x.reshape(-1, 3)), rtol=0, atol=1e-4)
    assert abs(density_bits(found.log_density, 3).mean - entropy(DATA.covariance)) < WITHIN


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(kind="ve"),
        ScheduleConfig(kind="flow"),
        ScheduleConfig(kind="vp"),
        ScheduleConfig(kind="cosine"),
        ScheduleConfig(zero_terminal_snr=True),
    ],
    ids=lambda config: config.kind,
)
def test_the_flow_on_other_laws(config: ScheduleConfig) -> None:
    """Between their own ends, 2e-3 to 1e6 in all, and from their own start: on ve N(0, sigma_max^2)."""
    schedule, x = make_schedule(config), gaussian_points(DATA)
    ends = schedule.sigma_min, schedule.sigma_max, start_of(schedule)
    found = flow_log_density(DATA.denoiser, x, *ends, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_density, flow_density(DATA, x.reshape(-1, 3), schedule), rtol=0, atol=5e-4)


def test_the_flow_gives_the_density_of_a_mixture() -> None:
    """In clusters, between them and far out. At sigma_max = 10^4 the start law lacks 1e-4 nats and less."""
    data = three_clusters()
    x = torch.tensor([[1.1, 0.2], [-0.8, 0.9], [0.0, 0.0], [2.5, 2.0]], dtype=torch.float64)
    low, high = 0.05, 1e4
    ends = (low, high, math.hypot(1, high))
    found = flow_log_density(data.denoiser, x.reshape(4, 1, 1, 2), *ends, rtol=1e-7, atol=1e-7)
    variance = data.deviation**2 + low**2
    parts = -torch.cdist(x, data.means).square() / (2 * variance) - math.log(2 * math.pi * variance)
    torch.testing.assert_close(found.log_density, torch.logsumexp(data.weights.log() + parts, 1), rtol=0, atol=3e-4)

    # Over all sign vectors of the plane Hutchinson's estimator is the exact trace.
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).reshape(1, 2, 1, 1, 2).expand(4, -1, -1, -1, -1)
    probed = flow_log_density(data.denoiser, x.reshape(4, 1, 1, 2), *ends, signs, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(probed.log_density, found.log_density, rtol=0, atol=1e-6)
