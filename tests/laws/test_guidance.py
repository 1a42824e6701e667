"""Guided laws that are known in closed form: what each rule makes of Gaussians and mixtures, at every level.

By Tweedie's formula a denoiser stands for a density, D = x + sigma^2 grad log p_sigma(x). So a rule is right if its
denoiser is the one of the density that it claims to sample from.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.conditioning.encoder import Encoder, Texts
from ldm.config import EncoderConfig, ScheduleConfig
from ldm.diffusion import Denoiser, bind, make_law, make_schedule
from ldm.guidance import (
    autoguidance,
    cfg,
    classifier_guidance,
    clip_guidance,
    conjunction,
    dynamic_threshold,
    perpendicular_negative,
    static_threshold,
)
from ldm.jobs import Ask
from ldm.sampling import ddim, make_grid

from .closed_forms import Gaussian, Mixture, sliced_wasserstein, three_clusters, three_dimensional

SIGMAS = (0.1, 1.0, 7.0)
DATA = three_clusters()


def level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


def points(count: int, d: int = 2) -> Tensor:
    return 2 * torch.randn(count, 1, 1, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cluster(k: int) -> Mixture:
    """The data given that it belongs to cluster k: one Gaussian."""
    return Mixture(torch.ones(1, dtype=torch.float64), DATA.means[k : k + 1], DATA.deviation)


def log_joint(x: Tensor, sigma: Tensor) -> Tensor:
    """log p(k, x) (B, 3) at level sigma, up to what is common to all; differentiable."""
    squares = (x.flatten(1)[:, None] - DATA.means).square().sum(dim=2)
    return DATA.weights.log() - squares / (2 * (DATA.deviation**2 + sigma**2))


def posterior_of(k: int | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(k | x, sigma), one k for all points or each its own: the best classifier there is."""

    def log_probability(x: Tensor, sigma: Tensor) -> Tensor:
        logits = log_joint(x, sigma).log_softmax(dim=1)
        return logits[torch.arange(len(x)), k]

    return log_probability


def branches_of(*denoisers: Denoiser):
    return lambda x, sigma, count=None: torch.stack([denoiser(x, sigma) for denoiser in denoisers[:count]])


def shifted(mean: Tensor, variance: float = 1.0) -> Denoiser:
    """E[x0 | x] of N(mean, variance I)."""
    return lambda x, sigma: mean + variance / (variance + sigma**2) * (x - mean)


# ---------------------------------------------------------------- by a classifier


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_exact_posterior_makes_the_conditional_denoiser(sigma: float) -> None:
    """Bayes at scale 1, each point with a class of its own, all in one batch."""
    x, own = points(30), torch.arange(30) % 3
    with torch.no_grad():
        found = classifier_guidance(DATA.denoiser, posterior_of(own), 1.0)(x, level(sigma))
    for k in range(3):
        torch.testing.assert_close(found[own == k], cluster(k).denoiser(x[own == k], level(sigma)))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_at_another_scale_it_is_the_denoiser_of_the_sharpened_density(sigma: float) -> None:
    """p_sigma(x) p(k | x)^w, its logarithm differentiated by central differences along each axis."""
    w, x, h = 2.5, points(10), 1e-5

    def log_density(x: Tensor) -> Tensor:
        return log_joint(x, level(sigma)).logsumexp(dim=1) + w * posterior_of(1)(x, level(sigma))

    axes = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 1, 2)
    slopes = [(log_density(x + h * axis) - log_density(x - h * axis)) / (2 * h) for axis in axes]
    expected = x + sigma**2 * torch.stack(slopes, dim=1).reshape(x.shape)
    found = classifier_guidance(DATA.denoiser, posterior_of(1), w)(x, level(sigma))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_classifier_free_guidance_is_guidance_by_the_implied_classifier(sigma: float) -> None:
    """p(k | x) is p(x | k) / p(x) times a constant, so both rules are one; cluster 2, scale 3."""
    x = points(10)
    free = cfg(branches_of(cluster(2).denoiser, DATA.denoiser), 3.0)(x, level(sigma))
    torch.testing.assert_close(classifier_guidance(DATA.denoiser, posterior_of(2), 3.0)(x, level(sigma)), free)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_an_observed_coordinate(sigma: float) -> None:
    """Data N(0, v), observed y = x0 + tau n: a "classifier" whose guided law is Gaussian at any scale.

    y given x is N(g x, R), g = v / (v + sigma^2), R = tau^2 + g sigma^2. At scale 1 the guided denoiser is that of
    the posterior of x0; at scale w the density p_sigma(x) N(y; g x, R)^w peaks where D(x) = x, at
    w g y / R over the precision 1 / (v + sigma^2) + w g^2 / R.
    """
    v, tau, y, w = 1.7, 0.6, 2.0, 4.0
    g = v / (v + sigma**2)
    R = tau**2 + g * sigma**2

    def log_probability(x: Tensor, sigma: Tensor) -> Tensor:
        return -(y - g * x.flatten()).square() / (2 * R)

    prior, x = shifted(torch.zeros(1, dtype=torch.float64), v), points(10, 1)
    expected = shifted(level(v * y / (v + tau**2)), v * tau**2 / (v + tau**2))(x, level(sigma))
    torch.testing.assert_close(classifier_guidance(prior, log_probability, 1.0)(x, level(sigma)), expected)
    peak = level(w * g * y / R / (1 / (v + sigma**2) + w * g**2 / R)).reshape(1, 1, 1, 1)
    torch.testing.assert_close(classifier_guidance(prior, log_probability, w)(peak, level(sigma)), peak)


def sampled(denoiser: Denoiser, count: int, d: int, steps: int = 60) -> Tensor:
    """(count, d): DDIM from pure noise."""
    schedule = make_schedule(ScheduleConfig(kind="cosine"))
    sigmas = make_grid(schedule, steps, "trailing")
    noise = torch.randn(count, 1, 1, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        *_, last = ddim()(denoiser, noise / float(schedule.alpha(sigmas[0])), sigmas, pytest.fail)  # type: ignore[arg-type]
    return last.x.flatten(1)


def test_samples_under_the_posterior_are_those_of_the_class() -> None:
    """4,000 guided samples of cluster 2 are as near to draws of it as draws are; a scale 10 % off is found."""
    generator = torch.Generator().manual_seed(1)
    a, b = cluster(2).draw(4000, generator), cluster(2).draw(4000, generator)
    floor = sliced_wasserstein(a, b)

    def distance(scale: float) -> float:
        guided = classifier_guidance(DATA.denoiser, posterior_of(2), scale)
        return sliced_wasserstein(sampled(guided, 4000, 2), a)

    assert distance(1.0) < 2 * floor < min(distance(0.9), distance(1.1))


# ---------------------------------------------------------------- by labels


class ClassNetwork:
    """The perfect class-conditional network of the clusters; the label after the last is all of the data."""

    law = make_law(ScheduleConfig(kind="cosine"), "x0")

    def prepare(self, told: Condition) -> Tensor:
        assert told.label is not None
        return told.label

    def __call__(self, x_in: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sigma = self.law.schedule.sigma(t[:1].double())[0]
        x = x_in.double() / self.law.schedule.alpha(sigma)
        of_each = torch.stack([each(x, sigma) for each in (*(cluster(k).denoiser for k in range(3)), DATA.denoiser)])
        return of_each[label, torch.arange(len(x))]


def told_of(labels: list[str]) -> list[Condition]:
    """What the encoder makes of the labels, and of none."""
    encoder = Encoder({}, EncoderConfig(labels=("first", "second", "third")), classes=3)
    asks = [Ask(label=label) for label in labels]
    return [encoder(asks), encoder.null(asks, Texts())]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_between_a_label_and_the_null_label(scale: float, sigma: float) -> None:
    """The score of p_sigma(x)^(1 - w) p_sigma(x | k)^w, by central differences, each point with a label of its own."""
    x, h, own = points(12), 1e-5, torch.arange(12) % 3
    branches = bind(ClassNetwork(), told_of([("first", "second", "third")[k] for k in own]), ClassNetwork.law)

    def log_density(x: Tensor) -> Tensor:  # log p(x | k) is log p(k, x) but for a constant
        joint = log_joint(x, level(sigma))
        return (1 - scale) * joint.logsumexp(dim=1) + scale * joint[torch.arange(12), own]

    axes = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 1, 2)
    slopes = [(log_density(x + h * axis) - log_density(x - h * axis)) / (2 * h) for axis in axes]
    expected = x + sigma**2 * torch.stack(slopes, dim=1).reshape(x.shape)
    torch.testing.assert_close(cfg(branches, scale)(x, level(sigma)), expected, rtol=1e-4, atol=1e-4)


def test_the_exact_classifier_makes_the_null_label_a_label() -> None:
    """Bayes at scale 1 in a network of labels: steered from the null label it is the network told the label."""
    told, own = told_of(["second"] * 10), torch.ones(10, dtype=torch.long)
    for sigma in SIGMAS:
        x = points(10)
        named, free = bind(ClassNetwork(), told, ClassNetwork.law)(x, level(sigma))
        steered = classifier_guidance(lambda *_: free, posterior_of(own), 1.0)(x, level(sigma))  # noqa: B023
        torch.testing.assert_close(steered, named, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- by a similarity


def tilted(data: Gaussian, direction: Tensor, scale: float) -> Gaussian:
    """p(x0) exp(scale direction . x0): the mean moves by scale C direction, the covariance stays."""
    return Gaussian(data.mean + scale * data.covariance @ direction, data.covariance)


def test_a_linear_similarity_tilts_a_gaussian_at_every_level() -> None:
    """decode is a linear map A and the similarity b . picture, so the direction in latents is A^T b."""
    data, scale = three_dimensional(), 0.8
    A = torch.tensor([[1.0, -0.5, 0.0], [0.2, 0.0, 1.5]], dtype=torch.float64)
    b = torch.tensor([0.7, -0.4], dtype=torch.float64)
    guided = clip_guidance(data.denoiser, lambda latent: latent @ A.T, lambda image: image.flatten(1) @ b, scale)
    expected = tilted(data, A.T @ b, scale)
    for sigma in SIGMAS:
        x = points(10, 3)
        with torch.no_grad():
            torch.testing.assert_close(guided(x, level(sigma)), expected.denoiser(x, level(sigma)))
    torch.testing.assert_close(sampled(guided, 200, 3), sampled(expected.denoiser, 200, 3))


# ---------------------------------------------------------------- by comparing predictions


@pytest.mark.parametrize("sigma", SIGMAS)
def test_autoguidance_sharpens(sigma: float) -> None:
    """The worse model has the variance 2 where the better has 1: p^w / worse^(w - 1) has a smaller one than both.

    Precisions of the noised laws add up: w / (1 + sigma^2) - (w - 1) / (2 + sigma^2).
    """
    w, mean, x = 3.0, torch.tensor([0.5, -1.0], dtype=torch.float64), points(10)
    guided = autoguidance(branches_of(shifted(mean, 1.0)), branches_of(shifted(mean, 2.0)), w)
    variance = 1 / (w / (1 + sigma**2) - (w - 1) / (2 + sigma**2))
    assert variance < 1 + sigma**2
    torch.testing.assert_close(guided(x, level(sigma)), x - sigma**2 * (x - mean) / variance)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_perpendicular_negative_of_gaussians(sigma: float) -> None:
    """Unit Gaussians around 0, (m, 0) and the negative's (a, b): guided is the one around scale (m, -w b).

    The negative's share a of the prompt's direction is left alone; a plain negative prompt would take it away.
    """
    m, a, b, scale, w = 1.5, 2.0, 0.7, 3.0, 0.4
    means = torch.tensor([[m, 0], [0, 0], [a, b]], dtype=torch.float64)
    branches = branches_of(*(shifted(mean) for mean in means))
    guided = perpendicular_negative(branches, w, scale)(points(10), level(sigma))
    expected = shifted(scale * torch.tensor([m, -w * b], dtype=torch.float64))(points(10), level(sigma))
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_conjunction_of_independent_attributes_is_exact(sigma: float) -> None:
    """Four clusters at (+-1, +-1), "right" and "up" each two of them: both together are the one at (1, 1)."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)

    def of(*chosen: int) -> Denoiser:
        weights = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
        return Mixture(weights, corners[list(chosen)], 0.4).denoiser

    x = points(10)
    both = conjunction(branches_of(of(0, 1), of(0, 1, 2, 3), of(0, 2)), (1.0, 1.0))(x, level(sigma))
    torch.testing.assert_close(both, of(0)(x, level(sigma)))
    neither_up = conjunction(branches_of(of(0, 1), of(0, 1, 2, 3), of(0, 2)), (1.0, 0.0))(x, level(sigma))
    torch.testing.assert_close(neither_up, of(0, 1)(x, level(sigma)))


# ---------------------------------------------------------------- what thresholding is for


def test_thresholding_brings_an_overdriven_law_back() -> None:
    """Guidance of scale 12 takes unit Gaussians' samples to a mean of 12; thresholds keep them within the bound.

    A dynamic one at percentile 1 divides the whole picture, so the pixels keep their proportions, and a static one
    flattens them.
    """
    mean = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    branches = branches_of(shifted(mean, 0.01), shifted(torch.zeros(3, dtype=torch.float64), 0.01))
    plain = cfg(branches, 12.0)
    free, static, dynamic = (
        sampled(denoiser, 200, 3).mean(dim=0)
        for denoiser in (plain, static_threshold(plain, 2.0), dynamic_threshold(plain, 2.0, 1.0))
    )
    torch.testing.assert_close(free, 12 * mean, rtol=0.1, atol=0)
    assert float(static.max()) <= 2 and float(dynamic.max()) <= 2
    assert math.isclose(float(static[1] / static[0]), 1.0, abs_tol=0.05)
    assert math.isclose(float(dynamic[1] / dynamic[0]), 0.5, abs_tol=0.05)
