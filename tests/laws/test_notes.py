"""The chain, its bound and DDIM: equations of the lecture notes that do not hold as they are printed, and what holds.

`docs/theory.md` lists them. Each test derives the truth another way (conditioning a joint Gaussian by matrices, closed
expectations of log densities), shows that the corrected form meets it, and that the printed one does not. Scores,
energies, SDEs, guidance and metrics are in test_notes_scores.py.

Names: beta_t, alpha_t = 1 - beta_t, bar_t = alpha_1 ... alpha_t, all indexed from t = 1 (index 0 is t = 0, bar = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.sampling import ddim

T = 6
BETA = np.array([0.0, 0.10, 0.16, 0.22, 0.28, 0.34, 0.40])
ALPHA = 1 - BETA
BAR = ALPHA.cumprod()
X0, Z = 0.7, -1.9


@dataclass(frozen=True)
class Affine:
    """mean + row . n with n ~ N(0, I): a Gaussian variable that remembers where its noise comes from."""

    mean: float
    row: np.ndarray

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.mean + other.mean, self.row + other.row)

    def scaled(self, factor: float, shift: float = 0.0) -> Affine:
        return Affine(factor * self.mean + shift, factor * self.row)

    @property
    def variance(self) -> float:
        return float(self.row @ self.row)


def chain(x0: float) -> list[Affine]:
    """z_0 .. z_T given z_0 = x0, from the definition z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) n_t."""
    states = [Affine(x0, np.zeros(T))]
    for t in range(1, T + 1):
        states.append(states[-1].scaled(math.sqrt(1 - BETA[t])) + Affine(0.0, math.sqrt(BETA[t]) * np.eye(T)[t - 1]))
    return states


def posterior(x0: float, t: int, z: float, earlier: int | None = None) -> tuple[float, float]:
    """Mean and variance of z_earlier (t - 1) given z_0 = x0 and z_t = z: regression of one affine form on another."""
    then, now = chain(x0)[t - 1 if earlier is None else earlier], chain(x0)[t]
    gain = float(then.row @ now.row) / now.variance
    return then.mean + gain * (z - now.mean), then.variance - gain * float(then.row @ now.row)


def eps_of(t: int) -> float:
    """The noise in z_t = Z when z_0 = X0."""
    return (Z - math.sqrt(BAR[t]) * X0) / math.sqrt(1 - BAR[t])


def x0_of(eps: float, t: int) -> float:
    """The data that z_t = Z shows when its noise is `eps`."""
    return (Z - math.sqrt(1 - BAR[t]) * eps) / math.sqrt(BAR[t])


def expected_log(value: Affine, mean: Affine, variance: float) -> float:
    """E log N(value; mean, variance)."""
    residual = value + mean.scaled(-1.0)
    return -0.5 * (math.log(2 * math.pi * variance) + (residual.mean**2 + residual.variance) / variance)


def kl(mean: float, variance: float, other_mean: float, other_variance: float) -> float:
    """KL(N(mean, variance) || N(other_mean, other_variance))."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - math.log(ratio) + (mean - other_mean) ** 2 / other_variance)


def differs(found: float, truth: float) -> bool:
    return abs(found - truth) > 0.01 * (1 + abs(truth))


# ---------------------------------------------------------------- forward and posterior


@pytest.mark.parametrize("t", range(2, T + 1))
def test_alpha_bar_multiplies_each_steps_own_beta(t: int) -> None:
    """Printed: the product over tau of (1 - beta_t)."""
    factor, variance = chain(1.0)[t].mean, chain(1.0)[t].variance
    assert (math.sqrt(BAR[t]), 1 - BAR[t]) == pytest.approx((factor, variance))
    assert differs(math.sqrt((1 - BETA[t]) ** t), factor)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_the_posterior_mean_in_eps_has_one_bar(t: int) -> None:
    """Printed: without the bar under the root, and (elsewhere) with a bar on the factor in front."""
    truth, _ = posterior(X0, t, Z)

    def form(front: float, under_root: float) -> float:
        return (Z - BETA[t] / math.sqrt(1 - under_root) * eps_of(t)) / math.sqrt(front)

    assert form(ALPHA[t], BAR[t]) == pytest.approx(truth)
    assert differs(form(ALPHA[t], ALPHA[t]), truth)
    assert differs(form(BAR[t], BAR[t]), truth)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_with_bars_everywhere_the_sampling_step_leaps_to_x0(t: int) -> None:
    """Printed: 1 / sqrt(bar) (z - (1 - bar) / sqrt(1 - bar) eps), which is x0 itself, not the next state's mean."""
    printed = (Z - (1 - BAR[t]) / math.sqrt(1 - BAR[t]) * eps_of(t)) / math.sqrt(BAR[t])
    assert printed == pytest.approx(X0)
    assert differs(printed, posterior(X0, t, Z)[0])


@pytest.mark.parametrize("t", range(3, T + 1))
def test_bayes_rule_uses_the_marginal_of_the_earlier_state(t: int) -> None:
    """Printed: N(z_{t-1}; sqrt(alpha_{t-1}) x0, ...). The product of two Gaussians in z_{t-1}, by their precisions."""

    def mean(prior_mean: float) -> float:
        precision = ALPHA[t] / BETA[t] + 1 / (1 - BAR[t - 1])
        return (math.sqrt(ALPHA[t]) / BETA[t] * Z + prior_mean / (1 - BAR[t - 1])) / precision

    truth, _ = posterior(X0, t, Z)
    assert mean(math.sqrt(BAR[t - 1]) * X0) == pytest.approx(truth)
    assert differs(mean(math.sqrt(ALPHA[t - 1]) * X0), truth)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_the_posterior_mean_adds_x0_over_one_minus_bar(t: int) -> None:
    """Printed: roots over both denominators, and a minus before x0."""
    of_z, of_x0 = math.sqrt(ALPHA[t]) * (1 - BAR[t - 1]), math.sqrt(BAR[t - 1]) * BETA[t]
    whole, root = 1 - BAR[t], math.sqrt(1 - BAR[t])
    truth, _ = posterior(X0, t, Z)
    assert (of_z * Z + of_x0 * X0) / whole == pytest.approx(truth)
    for wrong in ((of_z * Z - of_x0 * X0) / root, (of_z * Z + of_x0 * X0) / root, (of_z * Z - of_x0 * X0) / whole):
        assert differs(wrong, truth)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_what_multiplies_the_noise_is_a_deviation(t: int) -> None:
    """Printed: sqrt((1 - bar_{t-1}) / (1 - bar_t)) beta_t, as the noise's factor and, times eta, as DDIM's sigma_t."""
    fraction = (1 - BAR[t - 1]) / (1 - BAR[t])
    truth = math.sqrt(posterior(X0, t, Z)[1])
    assert math.sqrt(fraction * BETA[t]) == pytest.approx(truth)
    assert differs(math.sqrt(fraction) * BETA[t], truth)


def test_the_last_step_is_that_of_t_1() -> None:
    """Printed: index t, which the loop left at 2. The mean of x given z_1, when the noise is known, is x0."""

    def last(t: int) -> float:
        eps = (Z - math.sqrt(BAR[1]) * X0) / math.sqrt(1 - BAR[1])
        return (Z - BETA[t] / math.sqrt(1 - BAR[t]) * eps) / math.sqrt(ALPHA[t])

    assert last(1) == pytest.approx(X0)
    assert differs(last(2), X0)


# ---------------------------------------------------------------- the bound

SLOPE = np.array([0.0, 0.90, 0.85, 0.95, 0.80, 0.90, 0.75])  # of some model p(z_{t-1} | z_t) = N(slope z + 0.1, v)
VARIANCE = np.array([0.0, 0.12, 0.15, 0.20, 0.18, 0.30, 0.35])


def model_mean(z: Affine, t: int) -> Affine:
    return z.scaled(float(SLOPE[t]), 0.1)


def log_likelihood(x: float) -> float:
    """log p(x) of the model: its marginal is a Gaussian, found by walking down from p(z_T) = N(0, 1)."""
    mean, variance = 0.0, 1.0
    for t in range(T, 0, -1):
        mean, variance = SLOPE[t] * mean + 0.1, SLOPE[t] ** 2 * variance + VARIANCE[t]
    return -0.5 * (math.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)


def terms(x: float) -> tuple[float, list[float], list[float]]:
    """E_q of log p(z_T), and of log p(z_{t-1} | z_t) and log q(z_t | z_{t-1}) for t = 1 .. T (index 0 unused)."""
    z = chain(x)
    model = [0.0] + [expected_log(z[t - 1], model_mean(z[t], t), VARIANCE[t]) for t in range(1, T + 1)]
    forward = [0.0]
    forward += [expected_log(z[t], z[t - 1].scaled(math.sqrt(ALPHA[t])), BETA[t]) for t in range(1, T + 1)]
    return expected_log(z[T], Affine(0.0, np.zeros(T)), 1.0), model, forward


def bound(x: float) -> float:
    """E_q log p(x, z) / q(z | x), from its definition."""
    prior, model, forward = terms(x)
    return prior + sum(model) - sum(forward)


@pytest.mark.parametrize("x", [-1.0, 0.2, 2.0])
def test_the_bound_is_a_lower_bound(x: float) -> None:
    """Printed: log p(x) <= ELBO."""
    assert bound(x) < log_likelihood(x) - 0.01


@pytest.mark.parametrize("x", [-1.0, 0.2, 2.0])
def test_the_signs_inside_the_bound(x: float) -> None:
    """Printed: - log p(z_T) - sum from t = 1 of log p / q - log q(z_1 | x) + log p(x | z_1)."""
    prior, model, forward = terms(x)
    ends = -forward[1] + model[1]
    assert prior + sum(model[2:]) - sum(forward[2:]) + ends == pytest.approx(bound(x))
    assert differs(-prior - (sum(model[1:]) - sum(forward[1:])) + ends, bound(x))
    assert differs(-prior - (sum(model[2:]) - sum(forward[2:])) + ends, bound(x))
    assert differs(prior + (sum(model[1:]) - sum(forward[1:])) + ends, bound(x))


@pytest.mark.parametrize("x", [-1.0, 0.2, 2.0])
def test_the_bound_is_three_kinds_of_terms_and_none_can_be_left_out(x: float) -> None:
    """Each KL enters with a minus; "all that remains is the denoising term" forgets the reconstruction's."""
    z = chain(x)
    prior = kl(z[T].mean, z[T].variance, 0.0, 1.0)
    steps = 0.0
    for t in range(2, T + 1):  # the expectation over q(z_t | x) of a KL quadratic in z_t, exactly: three nodes
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            at = z[t].mean + math.sqrt(z[t].variance) * node
            steps += weight * kl(*posterior(x, t, at), SLOPE[t] * at + 0.1, VARIANCE[t])
    reconstruction = expected_log(z[0], model_mean(z[1], 1), VARIANCE[1])
    assert -prior - steps + reconstruction == pytest.approx(bound(x))
    assert differs(-prior + steps + reconstruction, bound(x))
    assert differs(reconstruction, 0.0), "it is part of what is learned: SLOPE[1] and VARIANCE[1] are in it alone"


def test_the_reverse_chain_has_each_transition_once() -> None:
    """Printed: p(x | z_1) times the product from t = 1. A joint density integrates to 1; with p(x | z_1) twice, not."""
    grid = np.linspace(-12, 12, 481)
    x, z1 = np.meshgrid(grid, grid, indexing="ij")

    def normal(value: np.ndarray, mean: np.ndarray | float, variance: float) -> np.ndarray:
        return np.exp(-((value - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    last, first = normal(x, SLOPE[1] * z1 + 0.1, VARIANCE[1]), normal(z1, 0.0, 1.0)
    cell = (grid[1] - grid[0]) ** 2
    assert float((last * first).sum() * cell) == pytest.approx(1.0)
    assert differs(float((last * last * first).sum() * cell), 1.0)


def test_the_denoising_term_carries_a_weight() -> None:
    """Printed: it "simplifies to" |eps - eps_theta|^2. The KL is that times beta^2 / (2 var alpha (1 - bar)) for the
    variance `var` of the model's step, far from constant in t: dropping it is a choice (L_simple), not algebra.
    """
    error = 0.3
    for t in range(2, T + 1):
        mean, variance = posterior(X0, t, Z)
        wrong, _ = posterior(x0_of(eps_of(t) + error, t), t, Z)
        for step_variance in (variance, BETA[t]):
            constant = kl(0.0, variance, 0.0, step_variance)
            weight = (kl(mean, variance, wrong, step_variance) - constant) / error**2
            assert weight == pytest.approx(BETA[t] ** 2 / (2 * step_variance * ALPHA[t] * (1 - BAR[t])))
    beta = np.linspace(1e-4, 0.02, 1000)  # the linear schedule of the notes' paper, posterior variance
    bar = (1 - beta).cumprod()
    weights = beta[1:] / (2 * (1 - beta[1:]) * (1 - bar[:-1]))
    assert weights[0] > 50 * weights[-1]


# ---------------------------------------------------------------- DDIM


def ddim_mean(t: int, earlier: int, x0: float, eps: float, variance: float) -> float:
    return math.sqrt(BAR[earlier]) * x0 + math.sqrt(1 - BAR[earlier] - variance) * eps


@pytest.mark.parametrize("t", range(2, T + 1))
def test_ddim_is_ddpm_at_the_posteriors_variance_only(t: int) -> None:
    """Printed for eta = 1: sigma_t = sqrt(fraction) beta_t, with which "same as DDPM" would not be true."""
    mean, variance = posterior(X0, t, Z)
    assert ddim_mean(t, t - 1, X0, eps_of(t), variance) == pytest.approx(mean)
    printed = (1 - BAR[t - 1]) / (1 - BAR[t]) * BETA[t] ** 2
    assert differs(ddim_mean(t, t - 1, X0, eps_of(t), printed), mean)


@pytest.mark.parametrize(("t", "earlier"), [(6, 3), (5, 2), (6, 1), (4, 2)])
def test_a_shortened_chain_has_betas_of_its_own(t: int, earlier: int) -> None:
    """Printed: sigma_t with beta_t for any sub-sequence. Between tau_{i-1} and tau_i, beta is 1 - bar_t / bar_tau."""
    _, variance = posterior(X0, t, Z, earlier)
    fraction = (1 - BAR[earlier]) / (1 - BAR[t])
    assert fraction * (1 - BAR[t] / BAR[earlier]) == pytest.approx(variance)
    assert differs(fraction * BETA[t], variance)


@pytest.mark.parametrize("t", range(2, T + 1))
def test_not_every_variance_keeps_the_marginal(t: int) -> None:
    """Printed: an arbitrary sigma_t^2. It keeps q(z_{t-1} | x0) up to 1 - bar_{t-1}; beyond, no real mean does."""
    now = chain(X0)[t]
    for variance in (0.0, 0.5 * (1 - BAR[t - 1]), 1 - BAR[t - 1]):
        slope = math.sqrt(max(1 - BAR[t - 1] - variance, 0.0)) / math.sqrt(1 - BAR[t])
        shift = (math.sqrt(BAR[t - 1]) - slope * math.sqrt(BAR[t])) * X0
        assert slope * now.mean + shift == pytest.approx(chain(X0)[t - 1].mean)
        assert slope**2 * now.variance + variance == pytest.approx(chain(X0)[t - 1].variance)
    too_large = 1.01 * (1 - BAR[t - 1])
    assert all(slope**2 * now.variance + too_large > 1 - BAR[t - 1] for slope in np.linspace(-2, 2, 41))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_uses_the_predicted_noise_in_both_places(eta: float) -> None:
    """Printed: eps_t inside x0's estimate beside eps_theta outside it; with the data's own noise nothing is sampled."""
    t, predicted = 4, 0.4
    sigmas = torch.from_numpy(np.sqrt((1 - BAR[[t, t - 1]]) / BAR[[t, t - 1]]))
    x = torch.full((1, 1, 1, 1), Z / math.sqrt(BAR[t]), dtype=torch.float64)

    def no_noise(sigma: float, sigma_next: float) -> Tensor:
        return torch.zeros_like(x)

    (step,) = ddim(eta)(lambda x, sigma: x - sigma * predicted, x, sigmas, no_noise)
    variance = eta**2 * posterior(X0, t, Z)[1]
    found = float(step.x) * math.sqrt(BAR[t - 1])
    assert ddim_mean(t, t - 1, x0_of(predicted, t), predicted, variance) == pytest.approx(found)
    assert differs(ddim_mean(t, t - 1, x0_of(eps_of(t), t), predicted, variance), found)
