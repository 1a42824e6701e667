"""Streaming mean and covariance: what all at once would give, however the features are divided and in what order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.metrics.moments import Moments


def features(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(x: torch.Tensor, cuts: list[int]) -> Moments:
    found = Moments.empty(x.shape[1])
    for piece in torch.tensor_split(x, sorted(cut % (len(x) + 1) for cut in cuts)):
        found.update(piece)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.lists(st.integers(0, 100), max_size=6), st.integers(0, 99))
def test_neither_order_nor_division_changes_them(count, cuts, seed):
    x = features(count, seed=seed)
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    streamed = parts(shuffled, cuts)
    assert streamed.count == count
    np.testing.assert_allclose(streamed.mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-12)


def test_those_of_two_processes_merge():
    x = features(30)
    mine, other = Moments.of(x[::2]), Moments.of(x[1::2])
    mine.merge(other)
    mine.merge(Moments.empty(5))
    torch.testing.assert_close(mine.covariance, Moments.of(x).covariance, atol=1e-13, rtol=0)


def test_a_mean_far_from_zero_costs_no_digits():
    """The sum of squares minus the square of the sum would have none left of sixteen."""
    x = features(200)
    near, far = parts(x, [50, 90]), parts(x + 1e7, [50, 90])
    torch.testing.assert_close(far.covariance, near.covariance, atol=1e-7, rtol=0)


def test_one_picture_has_no_covariance():
    with pytest.raises(UserError, match="at least 2"):
        _ = Moments.of(features(1)).covariance
