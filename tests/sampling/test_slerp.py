"""Noise between two seeds': unit normals again, exact at the ends, and of each picture by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ldm.jobs import Request
from ldm.sampling import BrownianPath, NoiseStream
from ldm.sampling.slerp import slerp, varied

SHAPE = (4, 32, 32)


def test_the_arc_is_of_unit_normals_and_even() -> None:
    a, b = (NoiseStream([seed], SHAPE).initial() for seed in (1, 2))
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=0, atol=1e-6)
    way = [slerp(a, b, place / 8) for place in range(9)]
    assert all(float(each.std()) == pytest.approx(1, abs=0.03) for each in way)
    angles = [float(torch.cosine_similarity(x.flatten(), y.flatten(), 0).acos()) for x, y in pairwise(way)]
    assert max(angles) / min(angles) < 1.05, "as far from frame to frame everywhere"


def test_what_lies_on_a_line_is_mixed_along_it() -> None:
    a = torch.randn(1, *SHAPE, dtype=torch.float64)
    for b in (a, 3 * a, -a, a + 1e-9 * torch.randn_like(a)):
        torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=0, atol=1e-7)


def test_each_row_has_an_angle_and_a_share_of_its_own() -> None:
    a, b = torch.randn(2, 3, *SHAPE)
    b[1] = a[1] + 0.1 * b[1]
    shares = torch.tensor([0.1, 0.5, 0.9])
    for i, row in enumerate(slerp(a, b, shares)):
        torch.testing.assert_close(row[None], slerp(a[i : i + 1], b[i : i + 1], float(shares[i])))


@pytest.mark.parametrize("kind", [NoiseStream, BrownianPath])
def test_only_the_start_is_turned(kind: type[NoiseStream] | type[BrownianPath]) -> None:
    plain = kind([4, 4], SHAPE)
    assert varied(plain, [Request("a", seed=4)] * 2) is plain
    turned = varied(kind([4, 4], SHAPE), [Request("a", seed=4), Request("a", seed=4, variation=(9, 0.5))])
    first, other = plain.initial(), NoiseStream([9], SHAPE).initial()
    assert torch.equal(turned.initial()[0], first[0])
    torch.testing.assert_close(turned.initial()[1:], slerp(first[1:], other, 0.5))
    assert torch.equal(turned(2.0, 1.0), plain(2.0, 1.0))
