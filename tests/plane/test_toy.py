"""The plane: the product's losses teach a tiny network, and the product's samplers draw what it learned."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from laws.closed_forms import sliced_wasserstein
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_law, precondition
from ldm.errors import UserError
from ldm.plane.energy import energy_score, langevin
from ldm.plane.toy import DISTRIBUTIONS, SHAPE, train_denoiser, train_energy, train_score
from ldm.sampling import NoiseStream, ddim, make_grid, start

COUNT = 2000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: Tensor, b: Tensor) -> float:
    return sliced_wasserstein(a.flatten(1).double(), b.flatten(1).double())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_laws_are_centred_of_unit_deviation_and_repeatable(name: str) -> None:
    points = DISTRIBUTIONS[name](20_000, generator(1))
    assert points.shape == (20_000, *SHAPE) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 0.05
    assert (points.std(0) - 1).abs().max() < 0.1
    assert torch.equal(points, DISTRIBUTIONS[name](20_000, generator(1)))


def test_a_denoiser_learns_a_law_and_the_sampler_draws_it() -> None:
    """Its distance from the data is less than half of that of the normals it was started from."""
    moons, law = DISTRIBUTIONS["two_moons"], make_law(ScheduleConfig(kind="cosine"), "v")
    network = train_denoiser(moons, law, steps=400)
    sigmas = make_grid(law.schedule, 12, "trailing")
    noise = NoiseStream(range(COUNT), SHAPE)
    x = start(noise.initial(), law.schedule, sigmas)
    for step in ddim()(precondition(network, law), x, sigmas, noise):
        x = step.x
    data = moons(COUNT, generator(2))
    before = distance(noise.initial(), data)
    assert distance(x, data) < before / 2


@cache
def clusters(sigma: float) -> tuple[Tensor, Tensor]:
    """Points of the mixture with noise on them (n, 2), and the score there, in closed form."""
    x = (
        DISTRIBUTIONS["mixture"](COUNT, generator(3)) + sigma * torch.randn(COUNT, *SHAPE, generator=generator(4))
    ).flatten(1)
    angle = torch.arange(8) * (math.pi / 4)
    means = 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    variance = 0.15**2 + sigma**2
    weights = (-torch.cdist(x, means).square() / (2 * variance)).softmax(1)
    return x, (weights @ means - x) / variance


@pytest.mark.parametrize("objective", ["denoising", "implicit", "sliced"])
def test_each_objective_learns_the_score(objective: str) -> None:
    """To a tenth of its own size, in the mean square over the law; 0 would be all of it."""
    x, wanted = clusters(0.4)
    score, _ = train_score(DISTRIBUTIONS["mixture"], objective, 0.4, steps=250)
    error = (score(x.reshape(-1, *SHAPE)).flatten(1) - wanted).square().mean()
    assert error < 0.1 * wanted.square().mean()


def test_an_energy_learns_a_law_by_likelihood() -> None:
    """New chains of the untrained energy end 0.7 away from the data; the more it learned, the nearer."""
    law, count = DISTRIBUTIONS["two_moons"], 1000
    data = law(count, generator(5)) + 0.15 * torch.randn(count, *SHAPE, generator=generator(6))
    distances = []
    for steps in (0, 40, 120):
        energy, chains = train_energy(law, steps=steps, walk=8)
        anew = 2 * torch.randn(count, *SHAPE, generator=generator(7))
        distances.append(distance(langevin(energy_score(energy), anew, 0.02, 100, generator(8)), data))
    assert chains.state.shape == (256, *SHAPE)
    assert distances[0] > 1.4 * distances[1] > 1.4**2 * distances[2], distances
    assert distances[2] < distances[0] / 3, distances


def test_training_is_repeatable_and_leaves_the_global_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    nets = [train_score(DISTRIBUTIONS["spiral"], "denoising", 0.5, steps=3, seed=4)[1] for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="choose denoising"):
        train_score(DISTRIBUTIONS["spiral"], "explicit", 0.5)
