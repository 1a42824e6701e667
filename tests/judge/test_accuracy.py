"""Nearest-prototype accuracy on a case small enough to work by hand."""

import math

import pytest
import torch

from ldm.judge.prompts import prototypes, wilson
from ldm.metrics.distances import ranks


def unit(*degrees: float) -> torch.Tensor:
    """Directions in the plane, (N, 2)."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_a_prototype_is_the_direction_of_the_mean():
    centres = prototypes(unit(10, 30, 90, 100, 110), torch.tensor([0, 0, 1, 1, 1]), 2)
    torch.testing.assert_close(centres, unit(20, 100))  # the mean of unit vectors lies on their bisector


def test_ranks_by_hand():
    centres = unit(0, 90, 180)
    pictures = unit(10, 50, 170, 100)  # nearest: 0 (10 off), 1 (40 off), 2 (10 off), 1 (10 off)
    assert ranks(pictures, torch.tensor([0, 0, 2, 2]), centres).tolist() == [0, 1, 0, 1]
    assert ranks(pictures, torch.tensor([2, 2, 0, 0]), centres).tolist() == [2, 2, 2, 2]
    assert ranks(5 * pictures, torch.tensor([0, 0, 2, 2]), centres).tolist() == [0, 1, 0, 1]  # length does not count


def test_a_tie_counts_against_the_picture():
    same = unit(45).repeat(4, 1)
    assert ranks(same, torch.arange(4), same).tolist() == [3, 3, 3, 3]


def test_a_concept_without_pictures_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 0, 1\]"):
        prototypes(unit(0, 90), torch.tensor([0, 2]), 3)


def test_wilson_interval():
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    low, high = wilson(0, 10)  # z^2 / (n + z^2)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-12)
