"""The forward law in one step against the chain walked step by step, for every schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule


def chain_betas(config: ScheduleConfig) -> np.ndarray:
    """The papers' beta_1 .. beta_T, written again and with plain numbers."""
    T = config.steps
    if config.kind == "linear":
        return np.array([config.beta_start + (config.beta_end - config.beta_start) * t / (T - 1) for t in range(T)])
    if config.kind == "scaled_linear":
        a, b = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
        return np.array([(a + (b - a) * t / (T - 1)) ** 2 for t in range(T)])

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - f(t + 1) / f(t), 0.999) for t in range(T)])


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_marginal_is_that_of_the_chain(kind: str, steps: int) -> None:
    """z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) n: mean factor and variance by recursion, from z_0 = x0."""
    config = ScheduleConfig(kind=kind, steps=steps)
    factor, variance, factors, variances = 1.0, 0.0, [], []
    for beta in chain_betas(config):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        factors.append(factor)
        variances.append(variance)
    schedule = make_schedule(config)
    alpha = schedule.alpha(schedule.sigmas).numpy()
    np.testing.assert_allclose(alpha, factors, rtol=1e-9)
    np.testing.assert_allclose((alpha * schedule.sigmas.numpy()) ** 2, variances, rtol=1e-9)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.square(factors), rtol=1e-9)


def test_drawn_chains_have_that_variance() -> None:
    """The same by drawing: 20,000 chains of 10 steps. Five standard errors of a variance are 5 %."""
    config = ScheduleConfig(kind="linear", steps=10, beta_start=0.02, beta_end=0.4)
    generator = torch.Generator().manual_seed(0)
    x0, z = 1.7, torch.full((20000,), 1.7)
    for beta in chain_betas(config):
        z = math.sqrt(1 - beta) * z + math.sqrt(beta) * torch.randn(z.shape, generator=generator)
    schedule = make_schedule(config)
    x = z / float(schedule.alpha(schedule.sigmas[-1]))
    assert float(x.var()) == pytest.approx(schedule.sigma_max**2, rel=0.05)
    assert float(x.mean()) == pytest.approx(x0, abs=5 * schedule.sigma_max / math.sqrt(len(x)))


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_noise() -> None:
    """Algorithm 1 of Lin et al. 2024: sqrt(alpha_bar) is an affine image of the old one, from the old first to 0."""
    plain = make_schedule(ScheduleConfig())
    rescaled = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    old, new = plain.alphas_cumprod.sqrt(), rescaled.alphas_cumprod.sqrt()
    slopes = new.diff() / old.diff()
    torch.testing.assert_close(slopes[:-1], slopes[0].expand(998), rtol=1e-7, atol=0)
    assert float(new[0]) == pytest.approx(float(old[0]), rel=1e-12)
    assert rescaled.sigma_max == 1e6 and rescaled.pure_noise_end and not plain.pure_noise_end
    assert float(new[-1]) == pytest.approx(0, abs=1.1e-6)
