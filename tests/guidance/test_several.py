"""Perpendicular negatives, conjunctions and autoguidance: limits and costs. Their laws are in tests/laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.guidance import autoguidance, cfg, conjunction, perpendicular_negative
from ldm.guidance.rule import inner

GENERATOR = torch.Generator().manual_seed(0)
PREDICTIONS = torch.randn(4, 3, 4, 5, 6, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(3, 4, 5, 6, generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.tensor(2.0, dtype=torch.float64)


class Fixed:
    """Branches with given answers that count the evaluations asked for."""

    def __init__(self, predictions: Tensor = PREDICTIONS) -> None:
        self.predictions = predictions
        self.counts: list[int | None] = []

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        self.counts.append(count)
        return self.predictions[:count]


# ---------------------------------------------------------------- perpendicular negative prompts


def with_negative(negative: Tensor) -> Fixed:
    return Fixed(torch.stack([PREDICTIONS[0], PREDICTIONS[1], negative]))


def test_without_weight_it_is_cfg_at_its_cost() -> None:
    branches = Fixed()
    found = perpendicular_negative(branches, 0.0, 5.0, 0.7)(X, SIGMA)
    torch.testing.assert_close(found, cfg(Fixed(), 5.0, 0.7)(X, SIGMA))
    assert branches.counts == [2]


@pytest.mark.parametrize("share", [1.0, 0.3, -2.0, 0.0])
def test_a_parallel_negative_does_nothing(share: float) -> None:
    """A negative that is the prompt itself, a part or the contrary of it, or nothing."""
    conditional, unconditional = PREDICTIONS[:2]
    branches = with_negative(unconditional + share * (conditional - unconditional))
    torch.testing.assert_close(perpendicular_negative(branches, 2.0, 5.0)(X, SIGMA), cfg(Fixed(), 5.0)(X, SIGMA))
    assert branches.counts == [3]


def test_an_orthogonal_negative_is_subtracted_whole() -> None:
    """As a plain negative direction would be: u + scale (d - w n)."""
    conditional, unconditional, negative = PREDICTIONS[:3]
    d, n = conditional - unconditional, negative - unconditional
    n = n - inner(n, d) / inner(d, d) * d
    found = perpendicular_negative(with_negative(unconditional + n), 0.8, 5.0)(X, SIGMA)
    torch.testing.assert_close(found, unconditional + 5 * (d - 0.8 * n))


def test_the_prompts_own_direction_keeps_its_strength() -> None:
    conditional, unconditional = PREDICTIONS[:2]
    d = conditional - unconditional
    for negative_scale in (0.5, 1.0, 7.0):
        moved = perpendicular_negative(Fixed(), negative_scale, 5.0)(X, SIGMA) - unconditional
        torch.testing.assert_close(inner(moved, d), 5 * inner(d, d))


def test_where_prompt_and_unconditional_agree() -> None:
    """No direction to be perpendicular to: the negative is subtracted whole, and nothing is divided by 0."""
    unconditional, negative = PREDICTIONS[1:3]
    found = perpendicular_negative(Fixed(torch.stack([unconditional, unconditional, negative])), 1.0, 2.0)(X, SIGMA)
    torch.testing.assert_close(found, unconditional - 2 * (negative - unconditional))


@pytest.mark.parametrize("sigma", [0.03, 14.6])
@pytest.mark.parametrize("name", ["eps", "v"])
def test_guiding_x0_is_guiding_the_networks_output(name: str, sigma: float) -> None:
    """The rule written for the network's output, as in the paper, then turned into x0."""
    from ldm.diffusion import PARAMETERIZATIONS

    parameterization, level = PARAMETERIZATIONS[name], torch.tensor(sigma, dtype=torch.float64)
    conditional, unconditional, negative = PREDICTIONS[:3]
    d, n = conditional - unconditional, negative - unconditional
    output = unconditional + 5 * (d - 0.8 * (n - inner(n, d) / inner(d, d) * d))

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        return parameterization.denoised(PREDICTIONS[:count], x, sigma)

    found = perpendicular_negative(branches, 0.8, 5.0)(X, level)
    torch.testing.assert_close(found, parameterization.denoised(output, X, level))


# ---------------------------------------------------------------- conjunction


def test_one_prompt_is_cfg_and_all_zero_is_unconditional() -> None:
    torch.testing.assert_close(conjunction(Fixed(), (5.0,))(X, SIGMA), cfg(Fixed(), 5.0)(X, SIGMA))
    branches = Fixed()
    torch.testing.assert_close(conjunction(branches, (0.0, 0.0, 0.0))(X, SIGMA), PREDICTIONS[1])
    assert branches.counts == [4]


def test_the_same_prompt_twice_adds_its_scales() -> None:
    conditional, unconditional = PREDICTIONS[:2]
    twice = Fixed(torch.stack([conditional, unconditional, conditional]))
    torch.testing.assert_close(conjunction(twice, (2.0, 3.0))(X, SIGMA), cfg(Fixed(), 5.0)(X, SIGMA))
    with pytest.raises(UserError, match="scale for each prompt"):
        conjunction(twice, ())


# ---------------------------------------------------------------- autoguidance


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_identical_models_are_one(scale: float) -> None:
    torch.testing.assert_close(autoguidance(Fixed(), Fixed(), scale)(X, SIGMA), PREDICTIONS[0])


def test_the_rule_and_its_cost() -> None:
    """Each model is asked for its own first branch; at scale 1 and outside the interval the worse is not asked."""
    better, worse = Fixed(), Fixed(PREDICTIONS[2:])
    found = autoguidance(better, worse, 3.0, interval=(0.5, 5.0))(X, SIGMA)
    torch.testing.assert_close(found, 3 * PREDICTIONS[0] - 2 * PREDICTIONS[2])
    assert torch.equal(autoguidance(better, worse, 3.0, interval=(0.5, 1.0))(X, SIGMA), PREDICTIONS[0])
    assert torch.equal(autoguidance(better, worse, 1.0)(X, SIGMA), PREDICTIONS[0])
    assert (better.counts, worse.counts) == ([1, 1, 1], [1])
    torch.testing.assert_close(autoguidance(better, worse, 0.0)(X, SIGMA), PREDICTIONS[2])


# ---------------------------------------------------------------- what all share


def test_rescale_and_interval_are_refused_alike() -> None:
    for rule in (
        lambda **given: perpendicular_negative(Fixed(), 1.0, 5.0, **given),
        lambda **given: autoguidance(Fixed(), Fixed(), 1.0, **given),
    ):
        with pytest.raises(UserError, match="between 0 and 1"):
            rule(rescale=-0.1)
        with pytest.raises(UserError, match="low < high"):
            rule(interval=(1.0, 1.0))


def test_outside_the_interval_the_prompt_stands_alone() -> None:
    branches = Fixed()
    assert torch.equal(perpendicular_negative(branches, 1.0, 5.0, interval=(3.0, 9.0))(X, SIGMA), PREDICTIONS[0])
    assert branches.counts == [1]
