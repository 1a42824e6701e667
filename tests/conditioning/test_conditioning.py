"""Conditioning records and classifier-free dropout."""

from __future__ import annotations

import pytest
import torch

from ldm.conditioning.dropout import drop
from ldm.conditioning.record import Conditioning, cat


def batch(size: int, seed: int = 0) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    return Conditioning(
        context=torch.randn(size, 5, 8, generator=draw),
        vector=torch.randn(size, 6, generator=draw),
        classes=torch.randint(0, 10, (size,), generator=draw),
        channels=torch.randn(size, 2, 4, 4, generator=draw),
    )


def equal(a: Conditioning, b: Conditioning) -> bool:
    pairs = [(a.context, b.context), (a.vector, b.vector), (a.classes, b.classes), (a.channels, b.channels)]
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def test_slices_and_cat_are_inverse():
    whole = batch(5)
    assert len(whole) == 5 and len(whole[1:3]) == 2
    assert equal(cat([whole[:2], whole[2:3], whole[3:]]), whole)
    captions = Conditioning(torch.randn(3, 5, 8))
    assert equal(cat([captions[:1], captions[1:]]), captions)
    assert cat([captions, captions]).vector is None


def test_repeat_keeps_the_prompts_order():
    context = torch.arange(2.0).view(2, 1, 1)
    assert Conditioning(context).repeat(3).context.flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_to_leaves_classes_whole():
    moved = batch(2).to("cpu", torch.float16)
    assert moved.context.dtype == moved.vector.dtype == moved.channels.dtype == torch.float16
    assert moved.classes.dtype == torch.int64
    assert equal(batch(2).to("cpu"), batch(2))


def test_parts_must_agree():
    with pytest.raises(ValueError, match="agree in batch size"):
        Conditioning(torch.zeros(2, 5, 8), vector=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="must be there"):
        Conditioning(None)
    with pytest.raises(ValueError, match="same parts"):
        cat([batch(1), Conditioning(torch.zeros(1, 5, 8))])
    assert len(Conditioning(None, classes=torch.zeros(4, dtype=torch.long))) == 4


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
    null = Conditioning(torch.zeros(1, 5, 8))
    mixed = drop(conditions, null, torch.zeros(3, dtype=torch.bool))
    assert mixed.context.count_nonzero() == 0
    assert torch.equal(mixed.channels, conditions.channels) and torch.equal(mixed.classes, conditions.classes)


def test_a_dropped_row_passes_no_nan_and_no_gradient():
    context = torch.ones(2, 5, 8)
    context[1] = torch.nan
    context.requires_grad_()
    mixed = drop(Conditioning(context), Conditioning(torch.zeros(1, 5, 8)), torch.tensor([True, False]))
    mixed.context.sum().backward()
    assert mixed.context.isfinite().all()
    assert torch.equal(context.grad, torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 5, 8))


def test_half_precision_keeps_its_type():
    mixed = drop(batch(2).to(dtype=torch.bfloat16), batch(1), torch.tensor([True, False]))
    assert mixed.context.dtype == torch.bfloat16


def test_dropout_refuses_what_does_not_fit():
    conditions, keep = batch(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="keep_mask"):
        drop(conditions, batch(1), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep_mask"):
        drop(conditions, batch(1), torch.ones(2))
    with pytest.raises(ValueError, match="does not fit"):
        drop(conditions, Conditioning(torch.zeros(1, 7, 8)), keep)
    with pytest.raises(ValueError, match="has none"):
        drop(Conditioning(torch.zeros(2, 5, 8)), batch(1), keep)
