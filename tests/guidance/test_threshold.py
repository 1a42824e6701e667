"""Static and dynamic thresholding: limits, and the percentile by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.guidance import dynamic_threshold, static_threshold

SIGMA = torch.tensor(1.0)


def same(x: Tensor, sigma: Tensor) -> Tensor:
    return x


def picture(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def test_static_clips() -> None:
    found = static_threshold(same, 2.0)(picture(-5, -2, 0.5, 3), SIGMA)
    torch.testing.assert_close(found, picture(-2, -2, 0.5, 2), rtol=0, atol=0)


@pytest.mark.parametrize("bound", [1.0, 3.0])
@pytest.mark.parametrize("percentile", [0.5, 0.995, 1.0])
def test_what_is_within_the_bound_stays_bit_for_bit(bound: float, percentile: float) -> None:
    x = bound * (2 * torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) - 1)
    assert torch.equal(dynamic_threshold(same, bound, percentile)(x, SIGMA), x)
    assert torch.equal(static_threshold(same, bound)(x, SIGMA), x)


def test_dynamic_at_percentile_one_only_divides() -> None:
    """By the largest |x0| over the bound, so the largest comes to the bound."""
    found = dynamic_threshold(same, 2.0, 1.0)(picture(-8, 2, 0.5, 4), SIGMA)
    torch.testing.assert_close(found, picture(-2, 0.5, 0.125, 1))


def test_dynamic_clips_above_the_percentile_and_divides() -> None:
    """|x0| is 0, 1, 2, 3, 10: the 0.75-quantile is 3, so 10 is clipped to 3 and all is divided by 3."""
    found = dynamic_threshold(same, 1.0, 0.75)(picture(0, -1, 2, 3, -10), SIGMA)
    torch.testing.assert_close(found, picture(0, -1 / 3, 2 / 3, 1, -1))
    between = dynamic_threshold(same, 1.0, 0.875)(picture(0, -1, 2, 3, -10), SIGMA)  # half way from 3 to 10
    torch.testing.assert_close(between, picture(0, -1, 2, 3, -6.5) / 6.5)


def test_dynamic_below_the_bound_is_static() -> None:
    """Few values beyond the bound: the percentile is within it, nothing is divided, they are clipped to the bound."""
    x = picture(*[0.5] * 99, 9.0)
    assert torch.equal(dynamic_threshold(same, 1.0, 0.9)(x, SIGMA), static_threshold(same, 1.0)(x, SIGMA))


def test_the_usual_percentile_is_imagens() -> None:
    """99.5 %, in the middle of a heavy tail."""
    x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)) ** 5
    found = dynamic_threshold(same, 1.0)(x, SIGMA)
    assert torch.equal(found, dynamic_threshold(same, 1.0, 0.995)(x, SIGMA))
    assert not torch.equal(found, dynamic_threshold(same, 1.0, 0.99)(x, SIGMA))


def test_each_picture_has_its_own_threshold() -> None:
    x = torch.cat([picture(0.2, 0.4), picture(-2, 4)])
    found = dynamic_threshold(same, 1.0, 1.0)(x, SIGMA)
    torch.testing.assert_close(found, torch.cat([picture(0.2, 0.4), picture(-0.5, 1)]))


def test_nonsense_is_refused() -> None:
    for rule in (static_threshold, dynamic_threshold):
        for bound in (0.0, -1.0, float("nan")):
            with pytest.raises(UserError, match="bound"):
                rule(same, bound)
    for percentile in (0.0, 1.5, 99.5):
        with pytest.raises(UserError, match="percentile"):
            dynamic_threshold(same, 1.0, percentile)
