"""Mixtures and buckets: who has a turn, that each sample comes once an epoch, and that no layout changes the order."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.config import DataConfig
from ldm.data.buckets import assign, bucket_sizes, nearest
from ldm.data.loader import Loader
from ldm.data.plan import Interleave
from ldm.data.samples import fault
from ldm.data.shards import open_set
from ldm.data.transforms import prepare
from ldm.errors import UserError

from .shard_maker import bare, picture, sample, write_tar

WEIGHTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=7)


@given(WEIGHTS)
@settings(deadline=None, max_examples=40)
def test_turns_are_in_proportion_at_all_times_and_each_is_counted_on(weights):
    turns, had = Interleave(weights), Counter()
    for n in range(300):
        player, before = turns.turn(n)
        assert before == had[player]
        had[player] += 1
        for i, weight in enumerate(weights):
            assert abs(had[i] - (n + 1) * weight / sum(weights)) <= (len(weights) + 1) / 2


@given(WEIGHTS, st.integers(0, 10**12))
@settings(deadline=None, max_examples=40)
def test_a_far_turn_follows_from_the_one_before_it(weights, n):
    turns = Interleave(weights)
    seen = [turns.turn(n + i) for i in range(40)]
    for player in range(len(weights)):
        numbers = [before for who, before in seen if who == player]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def shaped(key: str, width: int, height: int, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(seed, (width, height))), (f"{key}.txt", b"text")]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Two shards with 37 pictures of 12 shapes."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    shapes = [(8, 8), (9, 8), (8, 12), (16, 6), (30, 10), (10, 30), (5, 5), (12, 8), (8, 11), (7, 20), (40, 20), (6, 9)]
    members = [shaped(f"k{i:02d}", *shapes[i * i % 12], seed=i) for i in range(37)]
    for name, part in (("a", members[:30]), ("b", members[30:])):
        write_tar(folder / f"{name}.tar", [member for each in part for member in each])
    return str(folder / "*.tar")


BUCKETS = DataConfig(size=8, buckets=2, streams=4, shuffle=8, workers=0)


def rows(loader: Loader, batches: int) -> list[list[tuple[str, int, torch.Size]]]:
    return [
        [(bare(key), epoch, batch.image.shape[2:]) for key, epoch in zip(batch.key, batch.epoch, strict=True)]
        for batch in islice(loader, batches)
    ]


def test_each_batch_is_of_one_bucket_on_all_ranks_and_each_sample_comes_once_an_epoch(mixed):
    config = replace(BUCKETS, shards=mixed)
    alone = rows(Loader(config, 4), 60)
    assert all(len({shape for _, _, shape in batch}) == 1 for batch in alone)
    assert len({batch[0][2] for batch in alone}) > 2
    ranks = [rows(Loader(config, 4, rank, 4), 60) for rank in range(4)]
    assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == alone
    loader = Loader(config, 4)
    assert loader.buckets is not None
    everything = {key for shard in loader.data.shards for key in shard.keys}
    assert len(everything) == 37
    for epoch in range(4):  # buckets keep step to within a few batches
        assert Counter(key for batch in alone for key, e, _ in batch if e == epoch) == dict.fromkeys(everything, 1)


@given(stop=st.integers(0, 12), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=8)
def test_buckets_resume_on_any_number_of_ranks(mixed, stop, before, after):
    config = replace(BUCKETS, shards=mixed)
    whole = whole_run(config)
    first = Loader(config, 4, before - 1, before)
    list(islice(first, stop))
    parts = []
    for rank in range(after):
        loader = Loader(config, 4, rank, after)
        loader.load_state_dict(first.state_dict())
        parts.append(rows(loader, 14 - stop))
    assert [[row for part in each for row in part] for each in zip(*parts, strict=True)] == whole[stop:]


@cache
def _whole(shards: str) -> list[list[tuple[str, int, torch.Size]]]:
    return rows(Loader(replace(BUCKETS, shards=shards), 4), 14)


def whole_run(config: DataConfig) -> list[list[tuple[str, int, torch.Size]]]:
    return _whole(config.shards)


def test_a_bucketed_position_is_of_its_global_batch(mixed):
    config = replace(BUCKETS, shards=mixed)
    state = Loader(config, 4).state_dict()
    with pytest.raises(UserError, match=r"\(buckets, global batch differ\)|\(global batch differ\)"):
        Loader(config, 8).load_state_dict(state)
    with pytest.raises(UserError, match=r"buckets"):
        Loader(replace(config, buckets=0), 4).load_state_dict(state)


def test_the_histogram_is_in_the_plan_and_small_buckets_are_given_up(mixed):
    loader = Loader(replace(BUCKETS, shards=mixed), 4)
    assert loader.buckets is not None
    counts = Counter(loader.buckets.of)
    assert sum(counts.values()) == 37 and min(counts.values()) >= 4
    for place, (height, width) in enumerate(loader.buckets.sizes):
        assert f"{width}x{height}: {counts[place]}" in loader.describe()
        assert loader.histogram()[f"{width}x{height}"] == counts[place]
    assert Loader(replace(BUCKETS, shards=mixed, buckets=0), 4).histogram() == {}
    one = Loader(replace(BUCKETS, shards=mixed), 28)
    assert one.buckets is not None and len(one.buckets.sizes) == 1


@given(st.sampled_from([(64, 8), (512, 64), (256, 32)]), st.floats(1, 4))
@settings(deadline=None, max_examples=30)
def test_buckets_have_about_the_same_pixels_and_come_in_pairs(size_step, aspect):
    size, step = size_step
    found = bucket_sizes(size, step, aspect)
    assert (size, size) in found and all((w, h) in found for h, w in found)
    for height, width in found:
        assert height % step == width % step == 0 and max(height, width) / min(height, width) <= aspect
        assert abs(height * width / size**2 - 1) <= step * min(height, width) / 2 / size**2 + 1e-9


def test_the_nearest_bucket_is_nearest_in_the_logarithm():
    sizes = bucket_sizes(512, 64, 2)
    for height, width in [(100, 100), (1, 9), (480, 640), (768, 512), (2000, 1999)]:
        chosen = sizes[nearest(sizes, (height, width))]
        gaps = [abs(math.log(w / h) - math.log(width / height)) for h, w in sizes]
        assert abs(math.log(chosen[1] / chosen[0]) - math.log(width / height)) == min(gaps)
    with pytest.raises(UserError, match=r"data.size=100 must be a multiple of data.buckets=64"):
        bucket_sizes(100, 64, 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_in_the_bucket_of_what_is_seen(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "x", kind, exif=exif)
    extension = kind.lower()
    members = [(f"a.{extension}", (tmp_path / "x").read_bytes()), ("a.txt", b"t"), ("b.png", b"no"), ("b.txt", b"t")]
    data = open_set(str(write_tar(tmp_path / "x.tar", members)), "data.shards", fault)
    kept, buckets = assign(data, [(8, 4), (4, 8)], 1)
    assert buckets.sizes == ((8, 4),) and list(buckets.of) == [0] and len(kept) == 1
    assert kept.left_out == {"the picture does not decode": 1}


def test_the_crop_and_the_size_of_a_picture_say_what_is_seen_of_it(tmp_path):
    """Draw the picture's own coordinates into it: what the crop says must be what the corner shows."""
    import random

    for width, height, size in [(100, 60, (40, 40)), (60, 100, (40, 40)), (120, 50, (32, 48)), (50, 120, (48, 32))]:
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 2, y * 2, np.zeros_like(x)], -1).astype(np.uint8)
        for seed in range(8):
            made = prepare(Image.fromarray(pixels), size, "random", False, random.Random(seed))
            assert made.image.shape == (3, *size) and made.size == (height, width)
            scale = max(size[0] / height, size[1] / width)
            corner = (made.image[:2, 0, 0] + 1) * 127.5 / 2 * scale  # x, y of the corner, in resized pixels
            assert abs(float(corner[0]) - made.crop[1]) < 2 and abs(float(corner[1]) - made.crop[0]) < 2
            flipped = [prepare(Image.fromarray(pixels), size, "random", True, random.Random(seed))]
            right = round(width * scale) - size[1] - made.crop[1]
            assert flipped[0].crop[1] in (made.crop[1], right, right + 1, right - 1)
    members = [member for i in range(4) for member in shaped(f"k{i}", 30, 20, i)]
    config = DataConfig(shards=str(write_tar(tmp_path / "x.tar", members)), size=8, streams=4, workers=1)
    batch = next(iter(Loader(config, 4)))
    assert batch.size.tolist() == [[20, 30]] * 4 and batch.crop.tolist() == [[0, 2]] * 4


# ---------------------------------------------------------------- mixtures


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("sets")
    for name, count in (("a", 11), ("b", 5)):
        write_tar(folder / f"{name}.tar", [member for i in range(count) for member in sample(f"{name}{i}", i)])
    return str(folder / "a.tar"), str(folder / "b.tar")


def test_a_mixture_has_its_shares_and_each_set_its_own_epochs(sets):
    config = DataConfig(mixture={sets[0]: 1, sets[1]: 3}, size=8, streams=2, shuffle=4, workers=0)
    loader = Loader(config, 8)
    seen = [row[:2] for batch in rows(loader, 22) for row in batch]
    assert sum(key[0] == "a" for key, _ in seen) == 44 and sum(key[0] == "b" for key, _ in seen) == 132
    for name, count, epochs in (("a", 11, 4), ("b", 5, 26)):
        of_it = Counter(each for each in seen if each[0][0] == name)
        assert all(of_it[f"{name}{i}", epoch] == 1 for i in range(count) for epoch in range(epochs))
    assert "mixture 25.0% of 11" in loader.describe() and "75.0% of 5" in loader.describe()


def test_a_mixture_does_not_depend_on_ranks_and_resumes(sets):
    config = DataConfig(mixture={sets[0]: 0.3, sets[1]: 0.7}, size=8, streams=4, shuffle=4, workers=0)
    alone = rows(Loader(config, 8), 12)
    parts = []
    for rank in range(4):
        loader = Loader(config, 8, rank, 4)
        loader.load_state_dict({**loader.state_dict(), "samples": 40})
        parts.append(rows(loader, 7))
    assert [[row for part in each for row in part] for each in zip(*parts, strict=True)] == alone[5:]
    with pytest.raises(UserError, match="mixture differ"):
        Loader(replace(config, mixture={sets[0]: 0.5, sets[1]: 0.5}), 8).load_state_dict(Loader(config, 8).state_dict())


def test_a_mixture_of_buckets_has_both(sets, mixed):
    config = replace(BUCKETS, mixture={sets[0]: 1, mixed: 1}, shuffle=0)
    batches = rows(Loader(config, 8), 60)
    assert all(len({shape for _, _, shape in batch}) == 1 for batch in batches)
    share = sum(key[0] == "a" for batch in batches for key, _, _ in batch) / 480
    assert 0.45 < share < 0.55


def test_a_mixture_that_cannot_be_is_said(sets):
    with pytest.raises(UserError, match=r"data.shards and data.mixture are both set"):
        Loader(DataConfig(shards=sets[0], mixture={sets[1]: 1.0}), 8)
    with pytest.raises(UserError, match=r"must be above 0, not \[0.0\]"):
        Loader(DataConfig(mixture={sets[1]: 0.0}), 8)


def test_one_shard_on_four_ranks(sets):
    config = DataConfig(shards=sets[0], size=8, streams=4, shuffle=0, workers=0)
    ranks = [rows(Loader(config, 4, rank, 4), 11) for rank in range(4)]
    assert all(len(each) == 11 for each in ranks)
    seen = Counter(row[:2] for rank in ranks for batch in rank for row in batch)
    assert seen == {(f"a{i}", epoch): 1 for i in range(11) for epoch in range(4)}
