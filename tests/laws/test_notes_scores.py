"""Scores, energies, SDEs, guidance and attention: equations of the lecture notes that do not hold as they are printed.

The other half of test_notes.py. Truth comes from quadrature on a Gaussian mixture in one dimension, whose densities
need no formula of the library or the notes, or from closed forms on Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.guidance import cfg
from ldm.sampling import ddim, ddpm
from ldm.unet.attention import ContextKV, CrossAttention

GRID = np.linspace(-12, 12, 1201)
CELL = GRID[1] - GRID[0]
BAR = 0.6  # alpha_bar at the one level that the tests of scores look at
KEPT, NOISE = math.sqrt(BAR), math.sqrt(1 - BAR)


def normal(x: np.ndarray, mean: np.ndarray | float, variance: float) -> np.ndarray:
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def data(x: np.ndarray) -> np.ndarray:
    """The density of x0."""
    return 0.6 * normal(x, -1.2, 0.5) + 0.4 * normal(x, 1.5, 0.3)


def score_of(density: np.ndarray) -> np.ndarray:
    return np.gradient(np.log(np.maximum(density, 1e-250)), CELL)


JOINT = data(GRID)[:, None] * normal(GRID[None, :], KEPT * GRID[:, None], 1 - BAR)  # (x0, z)
MARGINAL = JOINT.sum(axis=0) * CELL
LIKELY = MARGINAL > 1e-4
SCORE = score_of(MARGINAL)
CONDITIONAL_SCORE = (KEPT * GRID[:, None] - GRID[None, :]) / (1 - BAR)


def given_z(values: np.ndarray) -> np.ndarray:
    """E[values(x0, z) | z], (z,)."""
    return (JOINT * values).sum(axis=0) * CELL / np.maximum(MARGINAL, 1e-250)


def far(found: np.ndarray, truth: np.ndarray) -> bool:
    return float(np.abs(found - truth)[LIKELY].max()) > 0.1


def close(found: np.ndarray, truth: np.ndarray) -> bool:
    return float(np.abs(found - truth)[LIKELY].max()) < 2e-3


# ---------------------------------------------------------------- scores


def test_the_marginal_integrates_over_x0() -> None:
    """Printed: the integral of q(x0) q(x_t | x0) dx. Over x_t it gives q(x0) back; over x0 it is q(x_t)."""
    over_z = JOINT.sum(axis=1) * CELL
    assert np.allclose(over_z, data(GRID), atol=1e-6)
    generator = np.random.default_rng(0)
    chosen = generator.random(200000) < 0.4
    x0 = np.where(chosen, 1.5, -1.2) + np.where(chosen, math.sqrt(0.3), math.sqrt(0.5)) * generator.normal(size=200000)
    z = KEPT * x0 + NOISE * generator.normal(size=200000)
    for edge in (-1.0, 1.0):
        wanted = float((z < edge).mean())
        assert MARGINAL[edge > GRID].sum() * CELL == pytest.approx(wanted, abs=0.006)
        assert abs(over_z[edge > GRID].sum() * CELL - wanted) > 0.02


def test_the_noise_predictor_is_the_marginal_score_times_a_deviation() -> None:
    """Printed: eps_theta ~ -score (the factor missing), and eps_theta as the score of q(x_t | x0)."""
    eps = given_z((GRID[None, :] - KEPT * GRID[:, None]) / NOISE)
    assert close(-NOISE * SCORE, eps)
    assert far(-SCORE, eps)
    of_one_x0 = -NOISE * (KEPT * 1.5 - GRID) / (1 - BAR)
    assert far(of_one_x0, eps)


def test_tweedie_takes_the_marginals_score() -> None:
    """Printed: E[mu | x] = x + var * score of N(x; mu, var), and the score of q(x_t | x0), which gives x0 back."""
    mean = given_z(KEPT * GRID[:, None] * np.ones_like(JOINT))
    assert close(GRID + (1 - BAR) * SCORE, mean)
    with_conditional = GRID[None, :] + (1 - BAR) * CONDITIONAL_SCORE
    assert np.allclose(with_conditional, KEPT * GRID[:, None]), "whatever z is: an identity, not an estimate"
    assert far(with_conditional[GRID.searchsorted(1.5)], mean)


def test_explicit_and_denoising_score_matching_differ_by_a_constant() -> None:
    """Printed: E |s - score of q(x_t)|^2 = E |s - score of q(x_t | x0)|^2. True up to what does not depend on s."""

    def losses(s: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        explicit = (MARGINAL * (s(GRID) - SCORE) ** 2).sum() * CELL
        denoising = (JOINT * (s(GRID)[None, :] - CONDITIONAL_SCORE) ** 2).sum() * CELL**2
        return float(explicit), float(denoising)

    models = [lambda z: -z, lambda z: -np.tanh(2 * z) * z**2, lambda z: np.interp(z, GRID, SCORE)]
    gaps = [denoising - explicit for explicit, denoising in map(losses, models)]
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-4)
    assert gaps[0] > 0.5
    assert losses(models[2])[0] < 1e-4 < 0.5 < losses(models[2])[1]


def test_the_target_of_a_kernel_is_over_its_own_deviation() -> None:
    """Printed: for the kernel N(x0, sigma^2), the target -eps / sqrt(1 - alpha_bar). Each kernel divides by its own."""
    sigma, x0, eps = 2.5, 0.4, -0.9
    x, step = x0 + sigma * eps, 1e-5
    log = lambda x: -((x - x0) ** 2) / (2 * sigma**2)  # noqa: E731
    slope = (log(x + step) - log(x - step)) / (2 * step)
    assert -eps / sigma == pytest.approx(slope, rel=1e-6)
    alpha_bar = 1 / (1 + sigma**2)  # of the chain's state at the same noise-to-signal ratio
    assert abs(-eps / math.sqrt(1 - alpha_bar) - slope) > 0.5


def test_the_score_at_level_t_is_of_the_noisy_law() -> None:
    """Printed: the gradient in x_t of log q(x_0), which is 0. Meant is log q(x_t); the gradient in x_0 also works:
    E[score of q at x0 | x_t], over alpha, is the score of q(x_t).
    """
    clean = score_of(data(GRID))
    assert close(given_z(clean[:, None] * np.ones_like(JOINT)) / KEPT, SCORE)
    assert far(np.zeros_like(SCORE), SCORE)
    assert far(clean, SCORE), "nor is it the clean law's score at the noisy point"


# ---------------------------------------------------------------- energies


def test_implicit_score_matching_subtracts_the_energys_curvature() -> None:
    """Printed: E[1/2 sum (dE/dx)^2 + d2E/dx2] + constant. Integration by parts gives a minus, and 1/2 for the square
    alone. The constant is E |score|^2 / 2 of the data, whatever the energy.
    """
    density = data(GRID)
    score = score_of(density)
    mean = lambda values: float((density * values).sum() * CELL)  # noqa: E731
    constant = mean(score**2) / 2
    for a, b in ((0.5, 0.0), (0.3, 0.05), (1.0, 0.02)):  # E = a x^2 + b x^4
        first, second = 2 * a * GRID + 4 * b * GRID**3, 2 * a + 12 * b * GRID**2
        divergence = mean((score + first) ** 2) / 2
        assert mean(first**2 / 2 - second) + constant == pytest.approx(divergence, rel=1e-3)
        for printed in (mean(first**2 / 2 + second), mean((first**2 + second) / 2)):
            assert abs(printed + constant - divergence) > 0.5


# ---------------------------------------------------------------- differential equations


def reverse_variance(drift_of_dt: Callable[[float], float]) -> float:
    """Data variance that the reverse VP equation gives back on N(0, 1.7^2), by Euler-Maruyama's own recursion.

    x <- x - f drift_of_dt(h) + g^2 score h + g sqrt(h) n on a Gaussian: its variance, step by step, is exact.
    """
    spread, low, high, steps = 1.7**2, 0.1, 20.0, 4000
    h = 1 / steps
    grown = lambda t: low * t + (high - low) * t**2 / 2  # noqa: E731
    exact = lambda t: spread * math.exp(-grown(t)) + 1 - math.exp(-grown(t))  # noqa: E731
    variance = exact(1.0)
    for i in range(steps, 0, -1):
        beta = low + (high - low) * i * h
        factor = 1 + beta / 2 * drift_of_dt(h) - beta / exact(i * h) * h
        variance = factor**2 * variance + beta * h
    return variance


def test_the_reverse_equation_multiplies_its_bracket_by_dt_once() -> None:
    """Printed: dx = [f dt - g^2 score] dt + g dw, in which f dt dt vanishes."""
    assert reverse_variance(lambda h: h) == pytest.approx(1.7**2, rel=0.01)
    assert abs(reverse_variance(lambda h: h * h) - 1.7**2) > 1


def test_a_diffusion_linear_in_x_is_not_gaussian() -> None:
    """Printed: if f and g are linear, p(x_t | x_0) is Gaussian. g must not depend on x (and f be affine in it).

    dx = g dw from x = 1, Euler-Maruyama: with g = x the third central moment is e^(3t) - 3 e^t + 2, with g = 1 it is 0.
    """
    generator = np.random.default_rng(0)
    multiplied, added = np.ones(40000), np.ones(40000)
    for _ in range(25):
        dw = generator.normal(size=40000) * math.sqrt(0.25 / 25)
        multiplied, added = multiplied + multiplied * dw, added + dw
    third = [float(((x - x.mean()) ** 3).mean()) for x in (multiplied, added)]
    assert third[0] == pytest.approx(math.exp(0.75) - 3 * math.exp(0.25) + 2, rel=0.25)
    assert third[1] == pytest.approx(0.0, abs=0.01)


def test_m_intervals_are_m_euler_steps() -> None:
    """Printed: for i = 0 .. M. On dx/dt = -x the result is then off by a whole step, e^-T (1 - h) for e^-T."""
    M, end = 400, 2.0
    h = end / M
    assert (1 - h) ** M == pytest.approx(math.exp(-end) * (1 - end * h / 2), rel=1e-4), "Euler's own error"
    assert abs((1 - h) ** (M + 1) - math.exp(-end) * (1 - end * h / 2)) > 0.9 * h * math.exp(-end)


def test_ancestral_steps_are_not_langevin_steps() -> None:
    """Printed: DDPM's reverse process is annealed Langevin dynamics. Per unit of score, Langevin adds variance 2, a
    small ancestral step 1: it is half Langevin, half the probability flow, which alone lowers the level.
    """
    sigmas = torch.tensor([1.0, 0.999], dtype=torch.float64)
    score = 0.3
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x + sigma**2 * score

    def unit(sigma: float, sigma_next: float) -> Tensor:
        return torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)

    (ancestral,) = ddpm("posterior")(denoiser, x, sigmas, unit)
    (flow,) = ddim()(denoiser, x, sigmas, unit)
    moved, noisy = ancestral.x.flatten().tolist()
    coefficient, variance = moved / score, (noisy - moved) ** 2
    assert variance / coefficient == pytest.approx(1, rel=0.01)
    assert coefficient - float(flow.x[0]) / score == pytest.approx(variance / 2, rel=0.01), "a Langevin step's drift"


# ---------------------------------------------------------------- guidance, attention, mixing, metrics


def test_guided_scores_are_of_no_diffused_law() -> None:
    """Guidance at w != 1 steers by the score of q^(1-w) q(.|c)^w at each level, said to sample that law. On Gaussians
    both are closed: from N(0, 1) and N(0, 0.5^2) at w = 3, the sharpened law noised to sigma has another score.
    """

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        return torch.stack([variance / (variance + sigma**2) * x for variance in (0.25, 1.0)])

    w, x = 3.0, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    precision = w / 0.25 + (1 - w) / 1.0  # of the sharpened law at sigma = 0
    for level in (0.01, 0.5, 2.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        score = float((cfg(branches, w)(x, sigma) - x) / sigma**2)
        product = -(w / (0.25 + level**2) + (1 - w) / (1 + level**2))
        diffused = -1 / (1 / precision + level**2)
        assert score == pytest.approx(product, rel=1e-9), "w = 0 is unconditional, w = 1 conditional"
        if level > 0.1:
            assert abs(score - diffused) > 0.05 * abs(diffused)
        else:
            assert score == pytest.approx(diffused, rel=0.02)


def test_cross_attention_asks_from_the_picture() -> None:
    """Printed: Q from the text, K and V from the picture. The output has a row for each position of the picture,
    follows a permutation of these, and ignores the order of the text's tokens.
    """
    torch.manual_seed(0)
    layer = CrossAttention(8, 6, 2)
    picture, text = torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    out = layer(picture, ContextKV((layer.project(text),)))
    assert out.shape == picture.shape
    moved = layer(picture[:, [4, 2, 0, 1, 3]], ContextKV((layer.project(text[:, [2, 0, 1]]),)))
    torch.testing.assert_close(moved, out[:, [4, 2, 0, 1, 3]])
    assert not torch.allclose(layer(picture, ContextKV((layer.project(2 * text),))), out)


def test_mixed_states_have_less_noise_than_their_level() -> None:
    """Printed: the sources are mixed without noise. They are noised first; with noises of their own the mix has
    deviation sigma sqrt((1 - m)^2 + m^2), with one noise for both it stays on its level.
    """
    generator = np.random.default_rng(0)
    n = generator.normal(size=(2, 200000))
    for share in (0.3, 0.5):
        own = (1 - share) * n[0] + share * n[1]
        assert float(own.std()) == pytest.approx(math.hypot(1 - share, share), rel=0.01)
        assert float(((1 - share) * n[0] + share * n[0]).std()) == pytest.approx(1, rel=0.01)


def test_an_inception_score_needs_many_pictures() -> None:
    """Printed: its demand for samples is small. exp(E KL(p(y | x) || mean p)) of N pictures is at most N."""
    certain = np.eye(100)

    def score(predictions: np.ndarray) -> float:
        mean = predictions.mean(axis=0)
        ratio = np.where(predictions > 0, predictions / np.where(mean > 0, mean, 1), 1)
        return math.exp((predictions * np.log(ratio)).sum(axis=1).mean())

    assert score(certain) == pytest.approx(100)
    assert score(certain[:10]) == pytest.approx(10)
