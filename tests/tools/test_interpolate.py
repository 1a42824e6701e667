"""The mixing itself, tools/studies/interpolate.py, on the tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.api import LatentDiffusion
from ldm.sampling import make_grid

STUDY = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "studies" / "interpolate.py"))
mix, WEIGHTS = STUDY["mix"], STUDY["WEIGHTS"]
STEPS = 20


@pytest.fixture
def pair() -> Tensor:
    """Two plain pictures (2, 3, 32, 32), so that latents are far from each other and noise is seen."""
    return torch.stack([torch.full((3, 32, 32), -0.5), torch.full((3, 32, 32), 0.5)])


def seen_first(model: LatentDiffusion, pair: Tensor, level: int) -> Tensor:
    """x = x0 + sigma n (WEIGHTS, C, h, w), the state in which the U-Net is asked first."""
    seen: list[Tensor] = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        mix(model, pair, "", STEPS, level)
    finally:
        hook.remove()
    sigma = make_grid(model.law.schedule, STEPS, "trailing")[STEPS - level]
    return seen[0].double() / model.law.schedule.alpha(sigma)


def test_level_0_mixes_the_latents_themselves(tiny_model: LatentDiffusion, pair: Tensor) -> None:
    mixed = mix(tiny_model, pair, "", STEPS, 0)
    with torch.no_grad():
        latents = tiny_model.codec.encode(pair)
        ends, middle = tiny_model.codec.decode(latents), tiny_model.codec.decode(latents.mean(0, keepdim=True))
    assert mixed.shape == (WEIGHTS, 3, 32, 32)
    torch.testing.assert_close(mixed[[0, -1]], ends, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[WEIGHTS // 2], middle[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", [3, 10, STEPS])
def test_a_mixture_has_the_noise_of_its_level(tiny_model: LatentDiffusion, pair: Tensor, level: int) -> None:
    """Also in the middle, where two independent noises averaged have 0.71 of it."""
    sigma = float(make_grid(tiny_model.law.schedule, STEPS, "trailing")[STEPS - level])
    with torch.no_grad():
        latents = tiny_model.codec.encode(pair).double()
    states = seen_first(tiny_model, pair, level)
    for place in (0, WEIGHTS // 2, WEIGHTS - 1):
        w = place / (WEIGHTS - 1)
        noise = (states[place] - (1 - w) * latents[0] - w * latents[1]) / sigma
        assert float(noise.std()) == pytest.approx(1, abs=0.15)
