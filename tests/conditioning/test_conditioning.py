"""Conditioning records and classifier-free dropout."""

from __future__ import annotations

import pytest
import torch

from ldm.conditioning.clip import TextTower
from ldm.conditioning.condition import Condition, cat, drop, lerp
from ldm.conditioning.encoder import Encoder, Texts
from ldm.config import TextConfig
from ldm.model_config import EncoderConfig


def batch(size: int, seed: int = 0) -> Condition:
    draw = torch.Generator().manual_seed(seed)
    return Condition(
        context=torch.randn(size, 5, 8, generator=draw),
        vector=torch.randn(size, 6, generator=draw),
        label=torch.randint(0, 10, (size,), generator=draw),
        planes=torch.randn(size, 2, 4, 4, generator=draw),
    )


def equal(a: Condition, b: Condition) -> bool:
    pairs = [(a.context, b.context), (a.vector, b.vector), (a.label, b.label), (a.planes, b.planes)]
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def test_slices_and_cat_are_inverse():
    whole = batch(5)
    assert len(whole) == 5 and len(whole[1:3]) == 2
    assert equal(cat([whole[:2], whole[2:3], whole[3:]]), whole)
    captions = Condition(torch.randn(3, 5, 8))
    assert equal(cat([captions[:1], captions[1:]]), captions)
    assert cat([captions, captions]).vector is None


def test_contexts_of_different_lengths_are_joined_with_a_mask():
    short, long = torch.randn(1, 3, 8), torch.randn(2, 5, 8)
    joined = cat([Condition(short), Condition(long)])
    assert joined.context.shape == (3, 5, 8) and torch.equal(joined.context[:1, :3], short)
    assert joined.mask.tolist() == [[True, True, True, False, False], [True] * 5, [True] * 5]
    again = cat([joined, Condition(long)])
    assert torch.equal(again.mask[:3], joined.mask) and bool(again.mask[3:].all())
    assert cat([Condition(long), Condition(long)]).mask is None
    with pytest.raises(ValueError, match="belongs to a context"):
        Condition(long, mask=joined.mask[:2, :3])


def test_between_two_conditions():
    a, b = batch(3), batch(3, seed=1)
    b = Condition(**{**b.parts(), "label": a.label})
    assert equal(lerp(a, b, 0.0), a) and equal(lerp(a, b, 1.0), b)
    short, long = Condition(torch.ones(1, 3, 8)), Condition(torch.zeros(1, 5, 8))
    middle = lerp(short, long, 0.25)
    assert middle.context[0, :, 0].tolist() == [0.75, 0.75, 0.75, 0, 0] and bool(middle.mask.all())
    with pytest.raises(ValueError, match="same parts"):
        lerp(short, Condition(torch.ones(1, 3, 8), vector=torch.ones(1, 2)), 0.5)


def test_parts_must_agree():
    with pytest.raises(ValueError, match="agree in batch size"):
        Condition(torch.zeros(2, 5, 8), vector=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="must be there"):
        Condition(None)
    with pytest.raises(ValueError, match="same parts"):
        cat([batch(1), Condition(torch.zeros(1, 5, 8))])
    assert len(Condition(None, label=torch.zeros(4, dtype=torch.long))) == 4


@pytest.mark.parametrize("null_rows", [1, 4])
def test_dropped_rows_are_the_null_rows_exactly(null_rows: int):
    conditions, null = batch(4), batch(null_rows, seed=1)
    keep = torch.tensor([True, False, True, False])
    mixed = drop(conditions, null, keep)
    for i in range(4):
        j = i if null_rows == 4 else 0
        assert equal(mixed[i : i + 1], conditions[i : i + 1] if keep[i] else null[j : j + 1])
    assert equal(drop(conditions, null, torch.ones(4, dtype=torch.bool)), conditions)


def test_what_null_lacks_is_kept():
    conditions = batch(3)
    null = Condition(torch.zeros(1, 5, 8))
    mixed = drop(conditions, null, torch.zeros(3, dtype=torch.bool))
    assert mixed.context.count_nonzero() == 0
    assert torch.equal(mixed.planes, conditions.planes) and torch.equal(mixed.label, conditions.label)


def test_a_dropped_row_passes_no_nan_and_no_gradient():
    context = torch.ones(2, 5, 8)
    context[1] = torch.nan
    context.requires_grad_()
    mixed = drop(Condition(context), Condition(torch.zeros(1, 5, 8)), torch.tensor([True, False]))
    mixed.context.sum().backward()
    assert mixed.context.isfinite().all()
    assert torch.equal(context.grad, torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 5, 8))


def test_half_precision_keeps_its_type():
    keep = torch.tensor([True, False])
    mixed = drop(Condition(torch.zeros(2, 5, 8, dtype=torch.bfloat16)), Condition(torch.ones(1, 5, 8)), keep)
    assert mixed.context.dtype == torch.bfloat16


def test_dropout_refuses_what_does_not_fit():
    conditions, keep = batch(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="keep must be bool"):
        drop(conditions, batch(1), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be bool"):
        drop(conditions, batch(1), torch.ones(2))
    with pytest.raises(ValueError, match="does not fit"):
        drop(conditions, Condition(torch.zeros(1, 5, 9)), keep)
    with pytest.raises(ValueError, match="has none"):
        drop(Condition(torch.zeros(2, 5, 8)), batch(1), keep)


def test_a_row_without_a_tower_has_zeros_there_where_the_context_is_wider_than_the_towers():
    config = TextConfig(context_length=8, width=32, heads=2, layers=2, embed_dim=16)
    encoder = Encoder({"text": TextTower(config), "text_2": TextTower(config)}, EncoderConfig(pooled=True, width=96))
    keep = {"text": torch.tensor([True, False]), "text_2": torch.tensor([True, True])}
    told = encoder.without(Texts(torch.ones(2, 8, 96), torch.ones(2, 32)), keep)
    assert told.context is not None and told.pooled is not None
    assert told.context[0, :, :64].all() and told.pooled[0].all()
    assert not told.context[1, :, :32].any() and told.context[1, :, 32:64].all()
    assert not told.pooled[1, :16].any() and told.pooled[1, 16:].all()
