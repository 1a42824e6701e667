"""Bayes' rule for one reverse step, by conditioning the joint Gaussian of a whole chain with matrices.

The lecture notes' forms of this step disagree with one another (a bar missing over alpha, a minus before x0, a variance
in the place of a deviation), so nothing is taken from them here: the chain's definition and Schur's complement only.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Schedule, make_schedule
from ldm.sampling import ddim, ddpm

CHAINS = {
    "linear": ScheduleConfig(kind="linear", steps=12, beta_start=0.01, beta_end=0.5),
    "scaled_linear": ScheduleConfig(kind="scaled_linear", steps=12, beta_start=0.01, beta_end=0.5),
    "cosine": ScheduleConfig(kind="cosine", steps=12),
}


def condition(schedule: Schedule, t: int, earlier: int, x0: float, z: float) -> tuple[float, float]:
    """Mean and variance of z_earlier given z_0 = x0 and z_t = z.

    The chain is a linear map of x0 and its noises, (z_1 .. z_T) = a x0 + L n: L row by row from the definition.
    """
    alphas_bar = schedule.alphas_cumprod.numpy()
    betas = 1 - alphas_bar / np.concatenate([[1.0], alphas_bar[:-1]])
    T = len(betas)
    a, L = np.zeros(T), np.zeros((T, T))
    for i, beta in enumerate(betas):
        a[i] = math.sqrt(1 - beta) * (a[i - 1] if i else 1.0)
        L[i] = math.sqrt(1 - beta) * (L[i - 1] if i else 0.0)
        L[i, i] += math.sqrt(beta)
    joint = L @ L.T
    gain = joint[earlier, t] / joint[t, t]
    return a[earlier] * x0 + gain * (z - a[t] * x0), joint[earlier, earlier] - gain * joint[t, earlier]


def one_step(sampler, schedule: Schedule, t: int, earlier: int, x0: float, z: float) -> tuple[float, float]:
    """Mean and variance, in the chain's coordinates, of a sampler's step from z_t = z when D says x0."""
    sigmas = schedule.sigmas[[t, earlier]]
    x = torch.full((2, 1, 1, 1), z, dtype=torch.float64) / schedule.alpha(sigmas[0])

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)

    (step,) = sampler(lambda x, sigma: torch.full_like(x, x0), x, sigmas, noise)
    without, with_noise = (step.x.flatten() * schedule.alpha(sigmas[1])).tolist()
    return without, (with_noise - without) ** 2


@given(
    kind=st.sampled_from(sorted(CHAINS)),
    pair=st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True).map(sorted),
    x0=st.floats(-3, 3),
    z=st.floats(-3, 3),
)
@settings(deadline=None, max_examples=80)
def test_ddpm_steps_by_bayes_rule(kind: str, pair: list[int], x0: float, z: float) -> None:
    """Neighbouring levels and any pair of levels, since a chain that skips some is a chain."""
    schedule = make_schedule(CHAINS[kind])
    earlier, t = pair
    expected = condition(schedule, t, earlier, x0, z)
    assert one_step(ddpm("posterior"), schedule, t, earlier, x0, z) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert one_step(ddim(1.0), schedule, t, earlier, x0, z) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("t", range(1, 12))
def test_the_beta_variance_is_the_forward_steps(t: int) -> None:
    schedule = make_schedule(CHAINS["scaled_linear"])
    mean, _ = condition(schedule, t, t - 1, 0.4, -1.3)
    beta = 1 - float(schedule.alphas_cumprod[t] / schedule.alphas_cumprod[t - 1])
    assert one_step(ddpm("beta"), schedule, t, t - 1, 0.4, -1.3) == pytest.approx((mean, beta), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_forward_marginal(eta: float) -> None:
    """Song et al. 2021, lemma 1: z_t ~ q(z_t | x0) stepped with the true x0 is ~ q(z_{t-1} | x0)."""
    schedule = make_schedule(CHAINS["linear"])
    for t in range(1, 12):
        at = [one_step(ddim(eta), schedule, t, t - 1, 0.8, z) for z in (0.0, 1.0)]
        slope, added = at[1][0] - at[0][0], at[0][1]
        alpha_bar, earlier = schedule.alphas_cumprod[t].item(), schedule.alphas_cumprod[t - 1].item()
        assert at[0][0] + slope * math.sqrt(alpha_bar) * 0.8 == pytest.approx(math.sqrt(earlier) * 0.8, rel=1e-9)
        assert slope**2 * (1 - alpha_bar) + added == pytest.approx(1 - earlier, rel=1e-9)
