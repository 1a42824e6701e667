"""Langevin moves: the discrete chain's own stationary law, exactly, and its limit for small moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.sampling import BrownianPath, Noise, NoiseStream, Sampler, ddpm, langevin, pc
from ldm.sampling.langevin import move, norms

from .affine import geometric, noised, output_law, slopes
from .closed_forms import Gaussian, three_dimensional

POINT = Gaussian(torch.tensor([0.4], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("h", [0.01, 0.2, 1.0, 1.7])
def test_the_stationary_variance_on_a_unit_normal(h: float) -> None:
    """x <- a x + b n settles at b^2 / (1 - a^2); a and b read off a move give 1 / (1 - h / 2)."""
    x, n = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1, 1)
    a, b = move(x, -x, h, n).flatten().tolist()
    assert b**2 / (1 - a**2) == pytest.approx(1 / (1 - h / 2), rel=1e-12)


@pytest.mark.parametrize("h", [0.05, 0.5, 1.3])
@pytest.mark.parametrize("moves", [1, 7])
def test_the_chain_at_one_level(h: float, moves: int) -> None:
    """Around a single point, where x is pure noise: v <- (1 - h)^2 v + 2 h r^2, from s^2, in closed form."""
    s, r = 3.0, 0.7
    sigmas = torch.tensor([s, r], dtype=torch.float64)
    found = output_law(langevin(moves, h), POINT, sigmas, POINT.mean, noised(POINT, s).covariance, "stream")
    settled = r**2 / (1 - h / 2)
    assert float(found.covariance) == pytest.approx(settled + (1 - h) ** (2 * moves) * (s**2 - settled), rel=1e-12)
    assert float(found.mean) == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("h", [0.4, 0.1])
def test_the_stationary_law_over_wide_data(h: float) -> None:
    """In an eigendirection of variance c the level's law has c + r^2, and the move is h r^2 / (c + r^2) of it."""
    data, r = three_dimensional(), 1.5
    values, vectors = torch.linalg.eigh(data.covariance)
    expected = (values + r**2) / (1 - h * r**2 / (values + r**2) / 2)
    sigmas = torch.tensor([2.0, r], dtype=torch.float64)
    start = Gaussian(data.mean, vectors @ torch.diag(expected) @ vectors.T)
    found = output_law(langevin(3, h), data, sigmas, start.mean, start.covariance, "stream")
    torch.testing.assert_close(found.covariance, start.covariance, rtol=0, atol=1e-12)


def test_the_limit_of_small_moves() -> None:
    """Annealed over six levels with h moves = 8 at each: what is left at the end falls with h, at order 1."""
    data = Gaussian(torch.tensor([0.3], dtype=torch.float64), torch.tensor([[0.49]], dtype=torch.float64))
    sigmas, errors = geometric(5.0, 0.6, 6), []
    start, wanted = noised(data, 5.0), noised(data, 0.6)
    for moves in (20, 40, 80):
        found = output_law(langevin(moves, 8 / moves), data, sigmas, start.mean, start.covariance, "stream")
        errors.append(abs(float(found.covariance - wanted.covariance)))
        assert float(found.mean) == pytest.approx(0.3, rel=1e-12)
    assert min(slopes(errors)) >= 0.9, (errors, slopes(errors))


def test_the_predictor_alone_is_ancestral_sampling() -> None:
    """On the variance-exploding law, alpha = 1, with the forward step's variance."""

    class Exploding:
        alpha = staticmethod(torch.ones_like)

    sigmas, shape = geometric(20.0, 0.1, 8), (1, 1, 3)
    x = 20 * NoiseStream([1, 2], shape).initial()
    for first, second in zip(
        pc(moves=0)(three_dimensional().denoiser, x, sigmas, NoiseStream([1, 2], shape)),
        ddpm("beta", Exploding())(three_dimensional().denoiser, x, sigmas, NoiseStream([1, 2], shape)),  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(first.x, second.x, rtol=1e-12, atol=1e-12)


def test_each_picture_has_its_own_step() -> None:
    """Song et al. 2021, algorithm 4, for each picture by hand: their scores differ a hundredfold."""
    sigmas = torch.tensor([3.0, 2.0], dtype=torch.float64)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] *= 100

    def two_noises() -> Noise:
        stream = NoiseStream([5, 6], (1, 4, 4), dtype=torch.float64)
        return stream

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 * x

    (step,) = pc(0.2)(denoiser, x, sigmas, two_noises())
    noise = two_noises()
    predicted = x + (9 - 4) * (-0.7 * x / 9) + math.sqrt(5) * noise(3, 2)
    n = noise(3, 2)
    for i in range(2):
        g = -0.7 * predicted[i] / 4
        epsilon = 2 * (0.2 * float(n[i].norm()) / float(g.norm())) ** 2
        torch.testing.assert_close(step.x[i], predicted[i] + epsilon * g + math.sqrt(2 * epsilon) * n[i])
    assert norms(x).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("sampler", [langevin(), pc()])
def test_moves_along_a_brownian_path_are_refused(sampler: Sampler) -> None:
    """It would give all moves of a level the same normal, and fifteen times the level's variance."""
    sigmas, path = geometric(3.0, 0.5, 3), BrownianPath([1], (1, 1, 3))
    with pytest.raises(UserError, match="NoiseStream, not a BrownianPath"):
        next(sampler(POINT.denoiser, path.initial(), sigmas, path))


def test_nonsense_is_refused() -> None:
    for h in (0.0, 2.0, -1.0, math.nan):
        with pytest.raises(UserError, match="between 0 and 2"):
            langevin(step_size=h)
    with pytest.raises(UserError, match="0 moves"):
        langevin(moves=0)
    for snr in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match="snr"):
            pc(snr=snr)
    with pytest.raises(UserError, match="-1 moves"):
        pc(moves=-1)
