"""Learned variance: the interpolation and its bound against the chain's own Gaussians, and who evaluates what."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.conditioning.condition import Condition
from ldm.config import DiffusionLossConfig, ScheduleConfig
from ldm.diffusion import (
    PARAMETERIZATIONS,
    Law,
    LearnedVariance,
    bind,
    diffusion_loss,
    make_schedule,
    precondition,
    weight,
)
from ldm.diffusion.learned_variance import variance_bound
from ldm.diffusion.schedule import PRESERVING, step_deviations
from ldm.guidance import cfg
from ldm.sampling import NoiseStream, ddpm, make_grid, start

CHAINS = {
    kind: make_schedule(ScheduleConfig(kind=kind, steps=8, beta_start=0.01, beta_end=0.4))
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid")
}


def chain_terms(schedule, v: float, x0: float, d: float, z_noise: float) -> Tensor:
    """(T,) L_{t-1} of a chain in z, from the papers' formulas with alpha_bar; L_0 is a Gaussian density."""
    bar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    alphas = bar / before
    betas = 1 - alphas
    tilde = betas * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    deviation = (((v + 1) / 2) * betas.log() + ((1 - v) / 2) * tilde.log()).exp().sqrt()
    z = bar.sqrt() * x0 + (1 - bar).sqrt() * z_noise

    def mean(start: float) -> Tensor:
        return before.sqrt() * betas / (1 - bar) * start + alphas.sqrt() * (1 - before) / (1 - bar) * z

    q = Normal(mean(x0)[1:], (betas * (1 - before) / (1 - bar))[1:].sqrt())
    divergence = kl_divergence(q, Normal(mean(d)[1:], deviation[1:]))
    decoder = -Normal(mean(d)[0], deviation[0]).log_prob(torch.tensor(x0, dtype=torch.float64))
    return torch.cat([decoder.reshape(1), divergence])


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("v", [-1.0, -0.3, 0.8, 1.0])
def test_the_bound_is_that_of_the_chain(kind: str, v: float) -> None:
    """Every term of L_vlb, on every schedule, to 1e-9; what noise was drawn does not matter."""
    schedule = CHAINS[kind]
    filled = torch.full((8, 2, 1, 3), v, dtype=torch.float64)
    found = variance_bound(filled, torch.full_like(filled, 0.2 - 0.7), schedule.sigmas, schedule)
    expected = chain_terms(schedule, v, x0=0.7, d=0.2, z_noise=-1.1)
    torch.testing.assert_close(found / 8, expected, rtol=1e-9, atol=1e-12)


def test_the_two_ends_are_the_samplers_variances() -> None:
    for s, r in ((14.6, 3.0), (1.0, 0.99), (0.3, 0.01)):
        levels = torch.tensor([s, r], dtype=torch.float64)
        low, high = (2 * deviation.log() for deviation in step_deviations(PRESERVING.alpha, *levels))
        assert float(low.exp()) == pytest.approx(r**2 * (1 - r**2 / s**2), rel=1e-12)
        assert float(high.exp()) == pytest.approx((s**2 - r**2) * (1 + r**2) / (1 + s**2), rel=1e-12)


def test_with_the_posteriors_variance_it_is_the_elbo_weight() -> None:
    """v = -1 leaves the means' error alone: w |D - x0|^2 with w of loss.weight=elbo, but for the decoder."""
    schedule = CHAINS["linear"]
    error = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = variance_bound(-torch.ones_like(error), error, schedule.sigmas, schedule)
    elbo = weight(DiffusionLossConfig(weight="elbo"), Law(schedule, PARAMETERIZATIONS["v"]), schedule.sigmas)
    expected = elbo * error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("variance", "best"), [(1.0, 1.0), (0.0, -1.0)])
def test_the_bound_is_least_at_the_variance_that_is_right(variance: float, best: float) -> None:
    """For data N(0, I) that is beta, for a point beta-tilde; the error has the variance of x0 given x."""
    schedule = CHAINS["scaled_linear"]
    sigma = schedule.sigmas[1:]
    error = (variance * sigma**2 / (variance + sigma**2)).sqrt().reshape(-1, 1, 1, 1)
    v = torch.full((7, 1, 1, 1), best, dtype=torch.float64, requires_grad=True)
    least = variance_bound(v, error, sigma, schedule)
    (slope,) = torch.autograd.grad(least.sum(), v)
    assert float(slope.abs().max()) < 1e-9
    for other in (best - 0.2, best + 0.2):
        assert bool((variance_bound(torch.full_like(v, other), error, sigma, schedule) > least).all())


def test_the_mean_learns_from_the_plain_loss_and_the_variance_from_the_bound() -> None:
    """The hybrid (their equation 16): no gradient of L_vlb reaches F, none of L_simple reaches v."""
    schedule, parameterization = CHAINS["cosine"], PARAMETERIZATIONS["eps"]
    generator = torch.Generator().manual_seed(1)
    x0, n, first, v = torch.randn(4, 8, 2, 3, 3, generator=generator, dtype=torch.float64)
    config = DiffusionLossConfig(variance_bound=0.3)
    both = torch.cat([first, v], dim=1).requires_grad_(True)
    hybrid = diffusion_loss(both, x0, n, schedule.sigmas, config, Law(schedule, parameterization))
    (gradient,) = torch.autograd.grad(hybrid.sum(), both)

    alone = first.clone().requires_grad_(True)
    simple = diffusion_loss(alone, x0, n, schedule.sigmas, config, Law(schedule, parameterization))
    torch.testing.assert_close(gradient[:, :2], torch.autograd.grad(simple.sum(), alone)[0], rtol=1e-12, atol=0)
    error = parameterization.denoised(first, x0 + schedule.sigmas.reshape(-1, 1, 1, 1) * n, schedule.sigmas) - x0
    v = v.requires_grad_(True)
    bound = 0.3 * variance_bound(v, error, schedule.sigmas, schedule)
    torch.testing.assert_close(hybrid, simple + bound, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient[:, 2:], torch.autograd.grad(bound.sum(), v)[0], rtol=1e-8, atol=1e-12)


def test_float32_and_a_chain_that_ends_in_noise_stay_finite() -> None:
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    sigma = schedule.sigmas[[0, 1, 500, 998, 999]]
    v = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1).expand(5, 2, 3, 3).clone().requires_grad_(True)
    bound = variance_bound(v, torch.full((5, 2, 3, 3), 0.5), sigma, schedule)
    bound.sum().backward()
    assert v.grad is not None and bool(bound.isfinite().all() and v.grad.isfinite().all())


# ---------------------------------------------------------------- evaluating


class Twofold:
    """A toy network of (x_in, t, vector) with 2 C channels; counts its evaluations."""

    def __init__(self) -> None:
        self.pictures = 0

    def prepare(self, told: Condition) -> Tensor:
        assert told.vector is not None
        return told.vector

    def __call__(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        self.pictures += len(x)
        shift = shift.reshape(-1, 1, 1, 1)
        return torch.cat([torch.tanh(x + shift), torch.sin(3 * x + t.reshape(-1, 1, 1, 1) / 100 + shift)], dim=1)


class Plain:
    """A network that is told nothing: a function of x."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def prepare(self, told: Condition) -> None:
        return None

    def __call__(self, x: Tensor, t: Tensor, told: None) -> Tensor:
        return self.function(x)


SCHEDULE = make_schedule(ScheduleConfig(steps=50))
TOLD = [Condition(vector=torch.tensor([[0.2], [-0.4]])), Condition(vector=torch.tensor([[1.0], [1.0]]))]
V = PARAMETERIZATIONS["v"]
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_fraction_is_the_prompts_own_and_costs_nothing() -> None:
    network, sigma = Twofold(), torch.tensor(1.3, dtype=torch.float64)
    branches = LearnedVariance(network, TOLD, Law(SCHEDULE, V))
    plain = bind(Twofold(), TOLD, Law(SCHEDULE, V))
    assert torch.equal(branches(X, sigma), plain(X, sigma))  # which never looks at the second half
    denoiser = cfg(branches, 3.0)
    denoiser(X, sigma)
    cost = network.pictures
    fraction = branches.fraction(X, sigma)
    assert network.pictures == cost == 8
    x_in, t = (X / math.hypot(1, 1.3)).float(), SCHEDULE.t(sigma).float().expand(2)
    expected = Twofold()(x_in, t, Twofold().prepare(TOLD[0]))[:, 3:]
    torch.testing.assert_close(fraction, expected.double(), rtol=0, atol=1e-6)
    assert fraction.dtype == torch.float64 and fraction.shape == X.shape
    assert torch.equal(branches.denoise(X, sigma), plain(X, sigma, 1)[0])


def test_another_state_or_level_is_evaluated() -> None:
    network = Twofold()
    branches = LearnedVariance(network, TOLD[:1], Law(SCHEDULE, V))
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    fractions = [branches.fraction(x, sigma) for x, sigma in ((X, one), (X, two), (X + 1, two), (X, one))]
    assert network.pictures == 8
    assert torch.equal(fractions[0], fractions[3])
    assert not torch.equal(fractions[0], fractions[1]) and not torch.equal(fractions[1], fractions[2])


def test_what_lies_outside_is_cut_and_a_network_without_a_second_half_refused() -> None:
    branches = LearnedVariance(Plain(lambda x: torch.cat([x, 5 * x], dim=1)), TOLD[:1], Law(SCHEDULE, V))
    fraction = branches.fraction(X, torch.tensor(1.0))
    assert float(fraction.min()) == -1 and float(fraction.max()) == 1
    narrow = LearnedVariance(Plain(lambda x: x), TOLD[:1], Law(SCHEDULE, V))
    with pytest.raises(ValueError, match="3 channels for x of 3, not twice as many"):
        narrow(X, torch.tensor(1.0))


@pytest.mark.parametrize(("second", "variance"), [(-1.0, "posterior"), (1.0, "beta")])
def test_ddpm_steps_with_it(second: float, variance: str) -> None:
    """At either end it is ddpm with that variance; one evaluation a step."""

    def output(x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return torch.cat([torch.tanh(x), torch.full_like(x, second)], dim=1)

    evaluations = 0
    sigmas = make_grid(SCHEDULE, 6)
    results = []
    for learned in (True, False):
        branches = LearnedVariance(Plain(output), TOLD[:1], Law(SCHEDULE, V))
        sampler = ddpm("learned", fraction=branches.fraction) if learned else ddpm(variance)
        noise = NoiseStream([3, 4], (3, 4, 4))
        *_, last = sampler(branches.denoise, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise)
        results.append(last.x)
    assert evaluations == 12
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_a_denoiser_of_such_a_network_takes_the_first_half() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), torch.full_like(x, math.nan)], dim=1)

    wide = precondition(network, Law(SCHEDULE, V))(X, torch.tensor(0.8))
    assert torch.equal(wide, precondition(lambda x, t: torch.tanh(x), Law(SCHEDULE, V))(X, torch.tensor(0.8)))
