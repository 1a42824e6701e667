"""Out of pure noise: the first step of some laws divides sigma by hundreds, and no sampler may carry that to the end.

Data are N(0, I) in 1,024 dimensions, so that a state's variance is told to a few percent by one picture, and the state
at level r should have 1 + r^2.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.sampling import (
    BrownianPath,
    NoiseStream,
    Sampler,
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
    langevin,
    make_grid,
    pc,
    restart,
    start,
)
from ldm.sampling.step import LEAP

SHAPE = (4, 16, 16)
LAWS = {
    "flow": make_schedule(ScheduleConfig(kind="flow")),
    "zero terminal SNR": make_schedule(ScheduleConfig(zero_terminal_snr=True)),
    "cosine": make_schedule(ScheduleConfig(kind="cosine")),
}
SAMPLERS: dict[str, Sampler] = {
    "ddim eta 1": ddim(1.0),
    "ddpm": ddpm(),
    "ddpm beta": ddpm("beta"),
    "euler_a": euler_a(),
    "heun churn": heun(s_churn=10.0),
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "dpmpp_3m_sde": dpmpp_3m_sde(),
    "dpmpp_sde": dpmpp_sde(),
    "dpm_2_a": dpm_2_a(),
    "dpmpp_2s_a": dpmpp_2s_a(),
    "restart": restart(),
    "langevin": langevin(),
    "pc": pc(),
}
STREAMS = ("heun churn", "restart", "langevin", "pc")


def unit_data(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("name", [*SAMPLERS, "euler_maruyama"])
def test_the_state_keeps_to_its_level(name: str, spacing: str, law: str) -> None:
    """The worst is pc after a leap to 29: the next step's noise, s^2 - r^2, is three times what the level r holds."""
    schedule = LAWS[law]
    sampler = euler_maruyama(schedule) if name == "euler_maruyama" else SAMPLERS[name]
    noise = (NoiseStream if name in STREAMS else BrownianPath)([7], SHAPE)
    sigmas = make_grid(schedule, 30, spacing)
    assert float(sigmas[0]) > LEAP * float(sigmas[1])
    x = start(noise.initial(), schedule, sigmas)
    shares = [float(step.x.var()) / (1 + step.sigma_next**2) for step in sampler(unit_data, x, sigmas, noise)]
    assert max(shares) < 5 and 0.6 < shares[-1] < 1.8, shares
