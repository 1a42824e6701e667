"""Score matching on a Gaussian, where the score is linear and every objective's expectation is a formula.

Everything is quadratic in data, noise and probes, so a dozen points with the right means and covariances are the
expectation itself, and nothing here is random but the last test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion.trace import draw_probes
from ldm.plane.score_matching import (
    Score,
    denoiser_of,
    denoising_score_matching,
    implicit_score_matching,
    score_of,
    sliced_score_matching,
)

MEAN = torch.tensor([0.4, -0.7], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.2, 0.5], [0.5, 0.6]], dtype=torch.float64)
SIGMA = torch.tensor(0.5, dtype=torch.float64)
NOISY = COVARIANCE + SIGMA**2 * torch.eye(2, dtype=torch.float64)


def axes(d: int) -> Tensor:
    """(2 d, d) points of mean 0 and covariance I."""
    reach = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
    return torch.cat([reach, -reach])


def data(covariance: Tensor = COVARIANCE) -> Tensor:
    """(4, 2) points of the data's mean and covariance."""
    return MEAN + axes(2) @ torch.linalg.cholesky(covariance).T


def pairs() -> tuple[Tensor, Tensor]:
    """(x0, n), (8, 2) each, independent to second order."""
    both = axes(4)
    return MEAN + both[:, :2] @ torch.linalg.cholesky(COVARIANCE).T, both[:, 2:]


def linear(precision: Tensor, mean: Tensor) -> Score:
    """The score of N(mean, precision^-1), the precision made symmetric."""
    return lambda x: -(x - mean) @ (precision + precision.T) / 2


def explicit(score: Score, covariance: Tensor) -> Tensor:
    """E |s - grad ln p|^2 / 2 under N(MEAN, covariance)."""
    x = data(covariance)
    return 0.5 * (score(x) + (x - MEAN) @ torch.linalg.inv(covariance)).square().sum(1).mean()


def both_signs(rows: int) -> Tensor:
    """(rows, 2, 2) probes: the plane's sign vectors, whose v v^T have the mean I."""
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).expand(rows, 2, 2)


def denoising(score: Score) -> Tensor:
    return denoising_score_matching(score, *pairs(), SIGMA).mean()


def implicit(score: Score) -> Tensor:
    return implicit_score_matching(score, data()).mean()


def sliced(score: Score) -> Tensor:
    return sliced_score_matching(score, data(), both_signs(4)).mean()


def sliced_plain(score: Score) -> Tensor:
    return sliced_score_matching(score, data(), both_signs(4), reduced=False).mean()


OBJECTIVES = {
    "denoising": (denoising, NOISY),
    "implicit": (implicit, COVARIANCE),
    "sliced": (sliced, COVARIANCE),
    "sliced, plain": (sliced_plain, COVARIANCE),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_is_the_explicit_objective_and_a_constant(name: str) -> None:
    """The constants: -E |grad ln p|^2 / 2 = -tr C^-1 / 2, and with noise (d / sigma^2 - tr (C + sigma^2)^-1) / 2."""
    objective, covariance = OBJECTIVES[name]
    constant = -0.5 * torch.linalg.inv(covariance).trace()
    if name == "denoising":
        constant = constant + 1 / SIGMA**2  # d / 2 sigma^2 with d = 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        precision, mean = torch.randn(2, 2, generator=generator).double(), torch.randn(2, generator=generator).double()
        score = linear(precision, mean)
        torch.testing.assert_close(objective(score), explicit(score, covariance) + constant)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_minimiser_is_the_laws_own_score(name: str) -> None:
    objective, covariance = OBJECTIVES[name]
    precision = torch.eye(2, dtype=torch.float64).requires_grad_()
    mean = torch.zeros(2, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([precision, mean], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(linear(precision, mean))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    found = ((precision + precision.T) / 2).detach()
    torch.testing.assert_close(found, torch.linalg.inv(covariance), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean.detach(), MEAN, rtol=0, atol=1e-5)


def test_denoising_is_the_loss_of_predicting_the_noise() -> None:
    """2 sigma^2 |s + n / sigma|^2 / 2 = |eps - n|^2, each picture at its own level."""
    x0, n = pairs()
    sigma = torch.linspace(0.2, 3.0, len(x0)).double()

    def eps(x: Tensor) -> Tensor:
        return x.sin()

    found = denoising_score_matching(lambda x: -eps(x) / sigma[:, None], x0, n, sigma)
    wanted = (eps(x0 + sigma[:, None] * n) - n).square().sum(1)
    torch.testing.assert_close(2 * sigma**2 * found, wanted)


def test_a_field_that_is_not_linear() -> None:
    """tr and |s|^2 of s = (x^2 y, sin x) by hand; a picture's shape does not matter."""
    x = data().reshape(4, 2, 1, 1)

    def score(x: Tensor) -> Tensor:
        a, b = x.flatten(1).unbind(1)
        return torch.stack([a**2 * b, a.sin()], dim=1).reshape(x.shape)

    a, b = x.flatten(1).unbind(1)
    wanted = 2 * a * b + 0.5 * ((a**2 * b) ** 2 + a.sin() ** 2)
    torch.testing.assert_close(implicit_score_matching(score, x), wanted)
    # Over both sign vectors the plain form's cross terms cancel too.
    probes = both_signs(4).reshape(4, 2, 2, 1, 1)
    for reduced in (True, False):
        torch.testing.assert_close(sliced_score_matching(score, x, probes, reduced), wanted)


def test_the_reduced_form_has_no_chance_in_its_second_term() -> None:
    """Signs are exact on a diagonal Jacobian, so nothing random is left; the plain form's (v^T s)^2 still varies."""
    score = linear(torch.diag(torch.tensor([2.0, 0.7], dtype=torch.float64)), MEAN)
    x, probes = data()[:1].expand(50, 2), draw_probes(range(50), (2,))
    reduced, plain = (sliced_score_matching(score, x, probes, form) for form in (True, False))
    torch.testing.assert_close(reduced, implicit_score_matching(score, x))
    assert plain.std() > 0.1


def test_scores_and_denoisers_are_each_others_inverse() -> None:
    """And Tweedie's formula on a Gaussian: D = MEAN + C (C + sigma^2)^-1 (x - MEAN)."""

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        noisy = COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
        return -(x - MEAN) @ torch.linalg.inv(noisy)

    x = data()
    denoiser: Callable[[Tensor, Tensor], Tensor] = denoiser_of(score)
    torch.testing.assert_close(denoiser(x, SIGMA), MEAN + (x - MEAN) @ torch.linalg.inv(NOISY) @ COVARIANCE)
    torch.testing.assert_close(score_of(denoiser, SIGMA)(x), score(x, SIGMA))
