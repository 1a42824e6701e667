"""CFG++: what it is, what it is a case of, and that a picture drawn so costs no more evaluations."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm import generate
from ldm.api import LatentDiffusion
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.guidance import cfg
from ldm.guidance.seen import Seen
from ldm.helpers import NONE
from ldm.jobs import Request, Settings
from ldm.sampling import NoiseStream, ddim, ddim_cfg_pp, euler, euler_a, euler_a_cfg_pp, euler_cfg_pp, make_grid, start

SCHEDULE = make_schedule(ScheduleConfig())
SIGMAS = make_grid(SCHEDULE, 8, "karras")
NOISE = NoiseStream([1, 2], (2, 3, 3)).initial()
X = start(NOISE, SCHEDULE, SIGMAS)


class Counted:
    """Two branches, and how many of them were asked for, each time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        self.asked.append(count or 2)
        c = torch.tanh(x.roll(1, dims=-1) / (1 + sigma**2).sqrt())
        return torch.stack([c, 0.4 * c.flip(-1) - 0.1])[: count or 2]


def end(sampler, denoiser) -> Tensor:
    stream = NoiseStream([1, 2], (2, 3, 3))
    *_, last = sampler(denoiser, X, SIGMAS, stream)
    return last.x


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_it_is_algorithm_2(scale: float) -> None:
    """Chung et al. 2024, in x = x0 + sigma n; and each prediction is made once."""
    branches, x = Counted(), X
    for s, r in pairwise(SIGMAS):
        c, u = branches(x, s)
        x = u + scale * (c - u) + r * (x - u) / s
    branches.asked.clear()
    seen = Seen(branches)
    found = end(euler_cfg_pp(seen.unguided), cfg(seen, scale))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert branches.asked == ([2] * 8 if scale != 1 else [1, 2] * 8)


def test_it_is_guidance_whose_scale_follows_from_the_step() -> None:
    """Euler's step with u + scale / (1 - r / s) (c - u) is the same, which is why large scales need none of it late."""
    branches, following = Counted(), dict(pairwise(SIGMAS.tolist()))

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        c, u = branches(x, sigma)
        return u + 0.6 / (1 - following[float(sigma)] / float(sigma)) * (c - u)

    seen = Seen(branches)
    expected = end(euler(), guided)
    torch.testing.assert_close(end(euler_cfg_pp(seen.unguided), cfg(seen, 0.6)), expected, rtol=0, atol=1e-9)


def test_where_nothing_is_guided_each_is_its_sampler() -> None:
    """u = c."""
    one = lambda x, sigma: Counted()(x, sigma, 1)[0]  # noqa: E731
    for plus, plain in (
        (euler_cfg_pp(one), euler()),
        (ddim_cfg_pp(one, 0.5), ddim(0.5)),
        (euler_a_cfg_pp(one), euler_a()),
        (euler_a_cfg_pp(one, 0.3, 0.9), euler_a(0.3, 0.9)),
    ):
        assert torch.equal(end(plus, one), end(plain, one))


@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_a_model_draws_by_it(tiny_model: LatentDiffusion, scale: float) -> None:
    """Along the whole path: the prediction put back is that of the negative prompt, at scale 1 too."""
    settings = Settings(sampler="Euler CFG++", cfg=scale, steps=3)
    requests = [Request("a red heart", "blue", 5)]
    plan = settings.plan()
    *_, last = generate.sample(tiny_model, requests, plan)
    denoiser, beside = generate.make_denoiser(tiny_model, requests, plan, NONE, (4, 8, 8), None)
    unguided = beside["unguided"]
    assert unguided is not None
    sigmas = generate.make_sigmas(tiny_model, plan)
    x = start(NoiseStream([5], (4, 8, 8)).initial(), tiny_model.law.schedule, sigmas)
    with torch.no_grad():
        for s, r in pairwise(sigmas):
            drawn = denoiser(x, s)
            x = drawn + r * (x - unguided(x.clone(), s)) / s
    assert float((last.x - x).abs().max()) < 1e-6
    other = dataclasses.replace(settings, sampler="euler").plan()
    *_, plain = generate.sample(tiny_model, requests, other)
    assert float((last.x - plain.x).abs().max()) > 1e-3
