"""A seed means the same noise alone, in any batch and at any position."""

from __future__ import annotations

import torch

from ldm.sampling import NoiseStream

SHAPE = (4, 3, 5)


def test_a_picture_has_the_same_noise_alone_and_in_any_batch() -> None:
    alone = NoiseStream([7], SHAPE)
    first, last = NoiseStream([7, 8, 9], SHAPE), NoiseStream([3, 12, 7], SHAPE)
    assert torch.equal(alone.initial()[0], first.initial()[0]) and torch.equal(alone.initial()[0], last.initial()[2])
    for _ in range(4):
        noise = alone(3.0, 2.0)
        assert torch.equal(noise[0], first(3.0, 2.0)[0]) and torch.equal(noise[0], last(3.0, 2.0)[2])


def test_steps_and_seeds_are_independent() -> None:
    stream = NoiseStream(range(64), (4, 16, 16))
    draws = torch.stack([stream.initial(), stream(3, 2), stream(2, 1)]).flatten(2).flatten(0, 1)
    assert abs(float(draws.mean())) < 0.01 and abs(float(draws.var()) - 1) < 0.02
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(correlations.abs().max()) < 6 / 1024**0.5


def test_the_start_does_not_depend_on_when_it_is_asked_for() -> None:
    early, late = NoiseStream([1], SHAPE), NoiseStream([1], SHAPE)
    start, noise = early.initial(), early(3, 2)
    assert torch.equal(late(3, 2), noise) and torch.equal(late.initial(), start)
    start.zero_()
    assert not torch.equal(early.initial(), start)


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    NoiseStream([5], SHAPE)(1, 0)
    assert torch.equal(torch.randn(3), expected)


def test_the_dtype_is_a_cast_of_the_same_numbers() -> None:
    assert torch.equal(
        NoiseStream([1], SHAPE, dtype=torch.float64).initial().float(), NoiseStream([1], SHAPE).initial()
    )
