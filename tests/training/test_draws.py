"""A sample's random numbers are its own, whatever batch, process or position it comes in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.training.draws import Draws

KEYS = [f"key{i}" for i in range(6)]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(KEYS), min_size=1, unique=True), st.integers(0, 99), st.integers(0, 9))
def test_numbers_do_not_depend_on_the_batch(some, step, seed):
    whole, part = Draws(seed, step, KEYS), Draws(seed, step, some)
    rows = [KEYS.index(key) for key in some]
    assert torch.equal(part.normal("noise", (2, 3)), whole.normal("noise", (2, 3))[rows])
    assert torch.equal(part.uniform("level"), whole.uniform("level")[rows])


def test_numbers_do_not_depend_on_what_was_drawn_before():
    draws = Draws(0, 1, KEYS)
    first = draws.normal("noise", (2,))
    draws.uniform("level")
    torch.manual_seed(99)
    assert torch.equal(draws.normal("noise", (2,)), first)


@pytest.mark.parametrize("other", [Draws(1, 0, KEYS), Draws(0, 1, KEYS), Draws(0, "validation", KEYS)])
def test_seed_step_and_purpose_matter(other):
    draws = Draws(0, 0, KEYS)
    assert not torch.equal(draws.uniform("level"), other.uniform("level"))
    assert not torch.equal(draws.uniform("level"), draws.uniform("caption dropout"))
    assert len(draws.uniform("level").unique()) == len(KEYS)


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1,) * 12, (8, 4)])
def test_strata_belong_to_the_global_batch_however_it_is_cut(sizes):
    keys = [f"sample{i}" for i in range(12)]
    whole = Draws(5, 7, keys, total=12).stratified("level")
    first, parts = 0, []
    for size in sizes:
        parts.append(Draws(5, 7, keys[first : first + size], first=first, total=12).stratified("level"))
        first += size
    assert torch.equal(torch.cat(parts), whole)
    assert sorted((whole * 12).long().tolist()) == list(range(12))
    inside = Draws(5, 7, keys).uniform("level")
    torch.testing.assert_close((whole * 12) % 1, inside, rtol=0, atol=1e-12)


def test_each_place_gets_every_stratum_in_turn():
    """A place belongs to a stream of the data, which must not be trained on one part of the levels."""
    steps = torch.stack([Draws(0, step, KEYS).stratified("level") for step in range(600)])
    counts = torch.stack([torch.bincount((steps[:, place] * 6).long(), minlength=6) for place in range(6)])
    assert counts.sum() == 3600 and float((counts - 100).abs().max()) < 5 * math.sqrt(100)
    assert abs(float(steps.mean()) - 0.5) < 0.005  # stratified: far less than the 0.024 of five standard errors
    assert not torch.equal(Draws(0, 1, KEYS).stratified("level"), Draws(0, 1, KEYS).stratified("another"))


def test_their_laws():
    """Mean and variance within five standard errors, each row from a generator of its own."""
    draws = Draws(0, 0, [str(i) for i in range(2000)])
    normal, uniform = draws.normal("noise", (4,)), draws.uniform("level")
    assert normal.dtype == torch.float32 and uniform.dtype == torch.float64
    count = normal.numel()
    assert abs(float(normal.mean())) < 5 / math.sqrt(count)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(uniform.mean()) - 0.5) < 5 / math.sqrt(12 * 2000)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert abs(float(torch.corrcoef(normal.T)[0, 1])) < 5 / math.sqrt(2000)
