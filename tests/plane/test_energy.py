"""An energy's score, the gradient of its likelihood, and the chains that stand for its law; all on Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.plane.energy import Chains, energy_score, langevin, likelihood_loss
from ldm.plane.score_matching import implicit_score_matching

PRECISION = torch.tensor([[2.0, -0.6], [-0.6, 1.1]], dtype=torch.float64)
MEAN = torch.tensor([0.4, -0.7], dtype=torch.float64)


def energy(x: Tensor) -> Tensor:
    return 0.5 * ((x - MEAN) @ PRECISION * (x - MEAN)).sum(1)


def points(mean: Tensor, covariance: Tensor) -> Tensor:
    """(4, 2) with this mean and covariance: an expectation of what is quadratic."""
    reach = math.sqrt(2) * torch.linalg.cholesky(covariance).T
    return torch.cat([mean + reach, mean - reach])


def test_the_score_of_an_energy() -> None:
    x = points(MEAN, torch.eye(2).double()) + 1
    with torch.no_grad():
        score = energy_score(energy)(x)
        assert not score.requires_grad and not x.requires_grad
    torch.testing.assert_close(score, -(x - MEAN) @ PRECISION)
    wanted = -PRECISION.trace() + 0.5 * score.square().sum(1)
    torch.testing.assert_close(implicit_score_matching(energy_score(energy), x), wanted)


def test_the_gradient_is_that_of_the_likelihood() -> None:
    """With draws of the model itself: -ln p = E + ln Z, and of a Gaussian ln Z = -ln det P / 2 and a constant."""
    precision, mean = PRECISION.clone().requires_grad_(), MEAN.clone().requires_grad_()

    def quadratic(x: Tensor) -> Tensor:
        return 0.5 * ((x - mean) @ precision * (x - mean)).sum(1)

    data = points(torch.tensor([1.0, 0.2]).double(), torch.tensor([[0.5, 0.1], [0.1, 2.0]]).double())
    model = points(MEAN, torch.linalg.inv(PRECISION))
    found = torch.autograd.grad(likelihood_loss(quadratic, data, model), [precision, mean])
    nll = quadratic(data).mean() - 0.5 * torch.logdet(precision)
    wanted = torch.autograd.grad(nll, [precision, mean])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_chain_settles_at_its_own_variance() -> None:
    """1 / (1 - h / 2) on N(0, 1): a quarter more at h = 0.4. 20,000 chains know it to 1 %."""
    start = torch.zeros(20_000, 1).double()
    end = langevin(lambda x: -x, start, 0.4, 60, torch.Generator().manual_seed(0))
    assert float(end.var()) == pytest.approx(1.25, rel=0.03)
    assert not bool(start.any())


def test_persistent_chains_learn_a_precision_up_to_their_own_bias() -> None:
    """E = k x^2 / 2 is right for the chain, not the law, where its variance 1 / (k (1 - h k / 2)) is the data's, 1.

    At h = 0.3 that is k = (1 - sqrt(1 - 2 h)) / h = 1.225, well apart from the law's own 1.
    """
    step = 0.3
    k = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def quadratic(x: Tensor) -> Tensor:
        return 0.5 * k * x.square().sum(1)

    data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    chains = Chains(torch.zeros(2000, 1).double(), step)
    seen = []
    for _ in range(300):
        loss = likelihood_loss(quadratic, data, chains.advance(energy_score(quadratic), 3))
        (slope,) = torch.autograd.grad(loss, k)
        with torch.no_grad():
            k -= 0.1 * slope
        seen.append(float(k.detach()))
    expected = (1 - math.sqrt(1 - 2 * step)) / step
    assert sum(seen[100:]) / 200 == pytest.approx(expected, rel=0.02)


def test_chains_go_on_and_are_renewed() -> None:
    start = torch.arange(1000.0).reshape(1000, 1)
    chains = Chains(start, 1e-12, seed=3, renewal=0.2)
    first = chains.advance(torch.zeros_like, 1)
    moved = (first - start).abs().flatten() > 0.5
    assert 0.15 < float(moved.double().mean()) < 0.25
    second = chains.advance(torch.zeros_like, 1)
    assert torch.equal(second, chains.state) and 0.15 < float(((second - first).abs() > 0.5).double().mean()) < 0.25
    assert torch.equal(start, torch.arange(1000.0).reshape(1000, 1))
    still = Chains(start, 1e-12).advance(torch.zeros_like, 2)
    torch.testing.assert_close(still, start, rtol=0, atol=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="more than 0"):
        langevin(torch.zeros_like, torch.zeros(1, 1), 0.0, 1)
    with pytest.raises(UserError, match="renewal"):
        Chains(torch.zeros(1, 1), 0.1, renewal=1.0)
