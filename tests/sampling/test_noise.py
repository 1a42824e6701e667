"""A seed means the same picture alone, in any batch and at any position; a path is the same at any number of steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.errors import UserError
from ldm.sampling import BrownianPath, NoiseStream
from ldm.sampling.noise import OCTAVE, point

SHAPE = (4, 3, 5)
KINDS = [NoiseStream, BrownianPath]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_the_same_noise_alone_and_in_any_batch(kind: type) -> None:
    alone = kind([7], SHAPE)
    first, last = kind([7, 8, 9], SHAPE), kind([3, 12, 7], SHAPE)
    assert torch.equal(alone.initial()[0], first.initial()[0]) and torch.equal(alone.initial()[0], last.initial()[2])
    for sigma in (3.0, 2.0, 1.3):
        noise = alone(sigma, 0.6 * sigma)
        assert noise.shape == (1, *SHAPE) and noise.dtype == torch.float32
        assert torch.equal(noise[0], first(sigma, 0.6 * sigma)[0])
        assert torch.equal(noise[0], last(sigma, 0.6 * sigma)[2])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_seeds_are_independent(kind: type) -> None:
    noise = kind(range(64), (4, 16, 16))
    draws = torch.stack([noise.initial(), noise(3, 2), noise(2, 1)]).flatten(2).flatten(0, 1)
    assert abs(float(draws.mean())) < 0.01 and abs(float(draws.var()) - 1) < 0.02
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(correlations.abs().max()) < 6 / 1024**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_does_not_depend_on_when_it_is_asked_for(kind: type) -> None:
    early, late = kind([1], SHAPE), kind([1], SHAPE)
    start, noise = early.initial(), early(3, 2)
    assert torch.equal(late(3, 2), noise) and torch.equal(late.initial(), start)
    start.zero_()
    assert not torch.equal(early.initial(), start)


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_generator_is_left_alone(kind: type) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    kind([5], SHAPE)(2, 1)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_a_cast_of_the_same_numbers(kind: type) -> None:
    wide, narrow = kind([1], SHAPE, dtype=torch.float64), kind([1], SHAPE)
    assert torch.equal(wide.initial().float(), narrow.initial())
    assert torch.equal(wide(3, 2).float(), narrow(3, 2))


def test_both_kinds_start_from_the_same_noise() -> None:
    assert torch.equal(NoiseStream([3, 4], SHAPE).initial(), BrownianPath([3, 4], SHAPE).initial())


def length(sigma: float, sigma_next: float) -> float:
    """Of an interval in the path's clock, in octaves and with its rounding."""
    return (point(sigma_next) - point(sigma)) / OCTAVE


def increment(path: BrownianPath, sigma: float, sigma_next: float) -> Tensor:
    return path(sigma, sigma_next) * math.sqrt(length(sigma, sigma_next))


LEVELS = st.lists(st.floats(1e-6, 1e7), min_size=3, max_size=5, unique_by=point).map(lambda xs: sorted(xs)[::-1])


@given(levels=LEVELS, order=st.permutations(range(5)))
@settings(deadline=None, max_examples=20)
def test_increments_add_up_in_whatever_order_they_are_asked_for(levels: list[float], order: list[int]) -> None:
    """To float64: the whole interval, its parts, and another path of the same seed that is asked for the whole only."""
    path, other = (BrownianPath([5], (1, 2, 2), dtype=torch.float64) for _ in range(2))
    steps = list(pairwise(levels))
    parts = [increment(path, *steps[i]) for i in order if i < len(steps)]
    whole = increment(other, levels[0], levels[-1])
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(increment(path, levels[0], levels[-1]), whole, rtol=1e-12, atol=1e-12)


def test_a_question_repeated_gets_the_same_answer() -> None:
    path = BrownianPath([5], SHAPE)
    first = path(3.7, 1.9)
    for i in range(20):
        path(10.0 + i, 9.5)
    assert torch.equal(path(3.7, 1.9), first)
    first.zero_()
    assert bool(path(3.7, 1.9).any()), "what was given is the caller's own"


INTERVALS = [(14.6, 9.0), (9.0, 8.9), (8.9, 8.0), (8.0, 1.0), (1.0, 0.96), (0.96, 0.03), (0.03, 1e-6), (1e7, 14.6)]


def test_adjoining_intervals_have_independent_normals() -> None:
    """40,000 values: five standard errors of a mean and of a correlation are 0.025, of a variance 0.036, and of the
    fourth moment, which tells a normal from anything else of that variance, 0.25."""
    path = BrownianPath([11], (1, 200, 200), dtype=torch.float64)
    draws = torch.stack([path(*interval).flatten() for interval in INTERVALS])
    assert float(draws.mean(dim=1).abs().max()) < 0.025
    assert float((draws.var(dim=1) - 1).abs().max()) < 0.036
    assert float(((draws**4).mean(dim=1) - 3).abs().max()) < 0.25
    assert float((torch.corrcoef(draws) - torch.eye(len(draws))).abs().max()) < 0.025


def test_overlapping_intervals_are_correlated_by_their_common_part() -> None:
    """Of W(a, c) and W(b, d) with a > b > c > d: the length of (b, c) over the geometric mean of both lengths."""
    path = BrownianPath([12], (1, 200, 200), dtype=torch.float64)
    for a, b, c, d in [(8.0, 8.0, 5.0, 3.1), (9.0, 6.0, 2.0, 0.5), (1.01, 1.0, 0.99, 0.97), (9.0, 6.0, 2.0, 2.0)]:
        expected = length(b, c) / math.sqrt(length(a, c) * length(b, d))
        found = (path(a, c) * path(b, d)).mean()
        assert float(found) == pytest.approx(expected, abs=0.036)


def test_the_variance_is_exact_point_by_point() -> None:
    """An increment is a linear map of its points' normals; its variance is that map's squared norm, with no drawing."""
    seen: list[int] = []

    class Unit(BrownianPath):
        """Gives the normals of the k-th point that is asked for as the k-th unit vector, in place of noise."""

        def _normals(self, at: int) -> Tensor:
            if at not in seen:
                seen.append(at)
            return torch.eye(120)[seen.index(at)].reshape(1, 1, 1, 120)

    for interval in [(3.7, 1.9), (1.95, 1.9), (1.0, 0.5), (1.2, 1.199), (14.6, 0.03), (1e6, 1e3)]:
        seen.clear()
        increment = Unit([0], (1, 1, 120), dtype=torch.float64)(*interval)
        assert float(increment.square().sum()) == pytest.approx(1, abs=1e-6), (
            interval
        )  # sqrt(1/2) etc. are rounded once


@pytest.mark.parametrize("interval", [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0), (math.inf, 1.0), (1.0, 1 - 1e-7)])
def test_intervals_that_are_none_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="Brownian path"):
        BrownianPath([0], SHAPE)(*interval)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_the_same_on_a_gpu(kind: type) -> None:
    here, there = kind([1, 2], SHAPE), kind([1, 2], SHAPE, "cuda")
    assert there(3, 2).device.type == "cuda"
    assert torch.equal(here.initial(), there.initial().cpu()) and torch.equal(here(3, 1), there(3, 1).cpu())
