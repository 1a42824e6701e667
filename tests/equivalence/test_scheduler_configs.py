"""What we read of a scheduler's settings is the law that diffusers' own class makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.said import Said, follow, settle
from ldm.checkpoints.scheduler_config import CHAINS, FLOWS, read_scheduler
from ldm.config import ModelConfig, ScheduleConfig
from ldm.diffusion import make_law, make_schedule, precondition
from ldm.sampling import NoiseStream, euler, make_grid, start

diffusers = pytest.importorskip("diffusers", reason="a peer to compare with, extra `peers`")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE, SEEDS = (4, 6, 5), [11, 12]


def read(plain: dict[str, Any]) -> ModelConfig:
    said: list[Said] = read_scheduler(plain, "", "here")[0]
    return follow(ModelConfig(), settle(said, "here", ()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(set(CHAINS) - {"DPMSolverSDE"}))  # that needs another library
def test_the_classs_own_betas(kind: str):
    """Where the file leaves them out, and where it has all of them."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    for plain in ({"_class_name": f"{kind}Scheduler"}, dict(scheduler.config) | {"_class_name": f"{kind}Scheduler"}):
        config = read(plain)
        assert config.parameterization == "eps" and config.schedule is not None
        ours = make_schedule(config.schedule).alphas_cumprod
        torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def network(z: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.8 * z.roll(1, dims=-1) + torch.sin(t.reshape(-1, 1, 1, 1) / 300)) + 0.2 * z


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("FlowMatchEulerDiscrete", {}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}),
    ],
)
def test_a_flows_steps(kind: str, options: dict[str, Any]):
    """On their levels, from the same noise, with the same network: z after each step, up to their float32.

    The multistep ones round the network's times to whole numbers.
    """
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    config = read(dict(scheduler.config) | {"_class_name": f"{kind}Scheduler"})
    assert kind in FLOWS or kind in CHAINS
    scheduler.set_timesteps(10)
    z = NoiseStream(SEEDS, SHAPE).initial().double()
    theirs = []
    for time in scheduler.timesteps:
        z = scheduler.step(network(z.float(), time.float().expand(len(z))).double(), time, z).prev_sample
        theirs.append(z)
    assert config.schedule is not None
    law = make_law(config.schedule, config.parameterization)
    tau = scheduler.sigmas.double()
    sigmas = (tau / (1 - tau)).clamp(max=law.schedule.sigma_max)
    noise = NoiseStream(SEEDS, SHAPE)
    denoise = precondition(network, law)
    steps = list(euler()(denoise, start(noise.initial(), law.schedule, sigmas), sigmas, noise))
    for step, expected in zip(steps, theirs, strict=True):
        torch.testing.assert_close(
            step.x / (1 + step.sigma_next), expected, rtol=0, atol=1e-5 if kind in FLOWS else 1e-3
        )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 28, 50])
def test_a_flows_grid(shift: float, steps: int):
    """Their levels in t, to their float32; the first is cut here at sigma 1e6, where t is 1 - 1e-6."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    config = read(dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert config.schedule == ScheduleConfig("flow", shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = make_grid(make_schedule(config.schedule), steps, "uniform")
    torch.testing.assert_close((sigmas / (1 + sigmas)).float(), scheduler.sigmas, rtol=0, atol=1.1e-6)
