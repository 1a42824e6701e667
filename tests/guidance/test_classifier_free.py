"""Classifier-free guidance: limits, costs, rescale, interval, and the guided law of two Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.guidance import cfg

GENERATOR = torch.Generator().manual_seed(0)
CONDITIONAL, UNCONDITIONAL = torch.randn(2, 3, 4, 5, 6, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(3, 4, 5, 6, generator=GENERATOR, dtype=torch.float64)


class Counted:
    """Branches with fixed answers that count the evaluations asked for."""

    def __init__(self) -> None:
        self.counts: list[int | None] = []

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        self.counts.append(count)
        return torch.stack([CONDITIONAL, UNCONDITIONAL])[:count]


def level(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_one_is_the_conditional_model_and_costs_one_evaluation(rescale: float) -> None:
    branches = Counted()
    assert torch.equal(cfg(branches, 1.0, rescale)(X, level(2)), CONDITIONAL)
    assert branches.counts == [1]


def test_the_rule() -> None:
    branches = Counted()
    guided = cfg(branches, 7.5)(X, level(2))
    torch.testing.assert_close(guided, 7.5 * CONDITIONAL - 6.5 * UNCONDITIONAL)
    assert branches.counts == [2]
    torch.testing.assert_close(cfg(Counted(), 0.0)(X, level(2)), UNCONDITIONAL)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_guiding_x0_is_guiding_the_networks_output(name: str, sigma: float) -> None:
    from ldm.diffusion import PARAMETERIZATIONS

    parameterization = PARAMETERIZATIONS[name]
    guided_output = UNCONDITIONAL + 5 * (CONDITIONAL - UNCONDITIONAL)

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        return parameterization.denoised(torch.stack([CONDITIONAL, UNCONDITIONAL])[:count], x, sigma)

    expected = parameterization.denoised(guided_output, X, level(sigma))
    torch.testing.assert_close(cfg(branches, 5.0)(X, level(sigma)), expected)


def test_rescale_gives_each_picture_the_conditional_deviation() -> None:
    plain, whole, part = (cfg(Counted(), 7.5, rescale)(X, level(2)) for rescale in (0.0, 1.0, 0.7))
    torch.testing.assert_close(whole.flatten(1).std(dim=1), CONDITIONAL.flatten(1).std(dim=1))
    ratio = CONDITIONAL.flatten(1).std(dim=1) / plain.flatten(1).std(dim=1)
    torch.testing.assert_close(whole, plain * ratio.reshape(3, 1, 1, 1))
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain)


def test_rescale_of_constant_predictions_is_finite() -> None:
    """An x0-network begins with zeros everywhere."""
    zeros = cfg(lambda x, sigma, count=None: torch.zeros(2, *x.shape), 7.5, 0.7)(X.float(), level(2))
    assert bool((zeros == 0).all())


def test_the_interval_is_open_below_and_closed_above() -> None:
    branches = Counted()
    denoise = cfg(branches, 4.0, interval=(0.5, 2.0))
    for sigma, inside in ((0.4, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)):
        found = denoise(X, level(sigma))
        assert torch.equal(found, CONDITIONAL) is not inside
    assert branches.counts == [1, 1, 2, 2, 1]


def test_the_interval_is_each_pictures_own() -> None:
    found = cfg(Counted(), 4.0, interval=(0.5, 2.0))(X, torch.tensor([0.1, 1.0, 9.0]))
    assert torch.equal(found[0], CONDITIONAL[0]) and torch.equal(found[2], CONDITIONAL[2])
    torch.testing.assert_close(found[1], 4 * CONDITIONAL[1] - 3 * UNCONDITIONAL[1])


def test_a_guided_gaussian_is_the_product_law() -> None:
    """At each level guidance follows the score of c^w u^(1-w); of unit Gaussians around +1 and 0 that is one around w.

    E[x0 | x] = (x + sigma^2 mean) / (1 + sigma^2) for N(mean, 1), so guided x0 is that of mean w.
    """

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        return torch.stack([(x + sigma**2 * mean) / (1 + sigma**2) for mean in (1.0, 0.0)])[:count]

    sigma = level(1.7)
    torch.testing.assert_close(cfg(branches, 3.0)(X, sigma), (X + sigma**2 * 3.0) / (1 + sigma**2))


def test_what_is_given_is_not_changed_and_nonsense_is_refused() -> None:
    x, sigma = X.clone(), level(2)
    cfg(Counted(), 7.5, 0.7, (0.0, 5.0))(x, sigma)
    assert torch.equal(x, X) and sigma == 2
    with pytest.raises(UserError, match="between 0 and 1"):
        cfg(Counted(), 7.5, 1.5)
    with pytest.raises(UserError, match="low < high"):
        cfg(Counted(), 7.5, interval=(2.0, 0.5))
    assert math.isfinite(float(cfg(Counted(), 7.5, interval=(0.5, math.inf))(x, sigma).sum()))
