"""The diagonal Gaussian against torch.distributions and against Monte Carlo."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.autoencoder.posterior import DiagonalGaussian


@pytest.fixture
def posterior() -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(0)
    return DiagonalGaussian(torch.randn(3, 4, 2, 5, generator=generator), torch.randn(3, 4, 2, 5, generator=generator))


def test_kl_is_that_of_torch_distributions(posterior):
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)))


def test_kl_is_the_mean_log_ratio_of_its_samples():
    posterior = DiagonalGaussian(torch.tensor([[[[0.7]]]]), torch.tensor([[[[-1.2]]]]))
    noise = torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    z = posterior.sample(noise)
    ratio = Normal(posterior.mean, (0.5 * posterior.logvar).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    error = ratio.std() / len(noise) ** 0.5
    assert abs(ratio.mean() - posterior.kl()) < 4 * error


def test_kl_of_the_prior_is_zero():
    assert DiagonalGaussian(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)).kl().tolist() == [0.0, 0.0]


def test_moments_round_trip(posterior):
    moments = posterior.moments()
    assert moments.shape == (3, 8, 2, 5)
    again = DiagonalGaussian.from_moments(moments)
    assert torch.equal(again.mean, posterior.mean) and torch.equal(again.logvar, posterior.logvar)


def test_samples_have_the_mean_and_the_variance(posterior):
    assert torch.equal(posterior.sample(torch.zeros_like(posterior.mean)), posterior.mode())
    step = posterior.sample(torch.ones_like(posterior.mean)) - posterior.mean
    torch.testing.assert_close(step.square(), posterior.logvar.exp())


def test_logvar_is_clamped_so_that_nothing_overflows():
    wild = DiagonalGaussian(torch.zeros(1, 2, 1, 1), torch.tensor([-1e9, 1e9]).reshape(1, 2, 1, 1))
    assert wild.logvar.flatten().tolist() == [-30.0, 20.0]
    assert wild.kl().isfinite().all() and wild.sample(torch.ones(1, 2, 1, 1)).isfinite().all()
