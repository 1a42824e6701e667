"""Sharing, resuming and bad samples, with items that are the samples' keys."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import DataConfig
from ldm.data import feed as feed_module
from ldm.data.feed import Feed, in_order
from ldm.data.shards import BadSample, Record, ShardSet, open_set
from ldm.errors import UserError

from .shard_maker import bare, text_shards

Row = tuple[str, int, float]  # key, epoch, what the keyed rng drew


@dataclass(frozen=True)
class Drawn:
    value: float


@dataclass(frozen=True)
class Rows:
    key: list[str]
    epoch: list[int]
    value: list[float]

    def __iter__(self) -> Iterator[Row]:
        return zip(map(bare, self.key), self.epoch, self.value, strict=True)


@dataclass
class Keys:
    """Items are a random number; `bad` keys do not decode."""

    bad: frozenset[str] = frozenset()
    seen: list[str] = field(default_factory=list)

    def __call__(self, record: Record, rng: random.Random) -> Drawn:
        self.seen.append(record.key)
        if record.key in self.bad:
            raise BadSample("it is bad")
        return Drawn(rng.random())


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory):
    """counts -> ShardSet of text samples; each is written once."""
    root: Path = tmp_path_factory.mktemp("sets")

    @cache
    def make(counts: tuple[int, ...]) -> ShardSet:
        return open_set(text_shards(root / "-".join(map(str, counts)), counts), "shards", lambda members: None)

    return make


def flat(batches: Sequence[list[Row]]) -> list[Row]:
    return list(chain.from_iterable(batches))


def take(data, batches, config=None, world=1, rank=0, each=2, seed=3, state=None, keys=None):
    """`batches` batches of a rank, `each` samples of every stream in a batch."""
    config = config or DataConfig(streams=8, shuffle=16, workers=0)
    feed = Feed(data, config, config.streams * each, rank, world, seed, keys or Keys(), Rows)
    if state is not None:
        feed.load_state_dict(state)
    got = [list(batch) for batch in islice(feed, batches)]
    return got, feed.state_dict()


def as_workers(data, batches, workers, **options):
    """What a DataLoader with `workers` would join, its workers played in this process one after another."""
    parts = []
    for number in range(workers):
        info = SimpleNamespace(id=number, num_workers=workers)
        with patch.object(feed_module, "get_worker_info", lambda info=info: info):
            parts.append(take(data, batches, **options)[0])
    return [flat(rows) for rows in zip(*parts, strict=True)]


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any).map(tuple)
LAYOUT = st.sampled_from([(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])  # processes, workers


@given(counts=COUNTS, layout=LAYOUT, each=st.integers(1, 3), shuffle=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_the_order_does_not_depend_on_processes_or_workers_and_each_epoch_is_exact(
    sets, counts, layout, each, shuffle, seed
):
    data, (world, workers) = sets(counts), layout
    config = DataConfig(streams=8, shuffle=shuffle, workers=0)
    batches = -(-3 * len(data) // (8 * each))
    alone, state = take(data, batches, config, each=each, seed=seed)
    shares = [
        as_workers(data, batches, workers, config=config, world=world, rank=rank, each=each, seed=seed)
        for rank in range(world)
    ]
    assert all(len(share) == batches and all(len(b) == 8 * each // world for b in share) for share in shares)
    assert [flat(parts) for parts in zip(*shares, strict=True)] == alone
    seen = Counter((key, epoch) for batch in alone for key, epoch, _ in batch)
    for epoch in range(3):
        assert all(seen[key, epoch] == 1 for shard in data.shards for key in shard.keys)
    assert state["samples"] == batches * 8 * each


@given(counts=COUNTS, stop=st.integers(0, 7), before=LAYOUT, after=LAYOUT)
@settings(deadline=None, max_examples=25)
def test_resuming_is_as_if_nothing_had_happened_on_any_layout(sets, counts, stop, before, after):
    data = sets(counts)
    whole, _ = take(data, 8)
    _, state = take(data, stop, world=before[0], rank=before[0] - 1)
    rest = [as_workers(data, 8 - stop, after[1], world=after[0], rank=r, state=state) for r in range(after[0])]
    assert [flat(parts) for parts in zip(*rest, strict=True)] == whole[stop:]


@pytest.mark.parametrize("workers", [1, 2])
def test_real_worker_processes_give_the_same_and_resume_the_same(sets, workers):
    data = sets((5, 0, 11))
    config = DataConfig(streams=8, shuffle=16, workers=workers)
    whole, _ = take(data, 9)
    got, state = take(data, 4, config)
    assert got == whole[:4]
    assert take(data, 5, config, state=state)[0] == whole[4:]


def test_seeking_reads_nothing_of_what_it_skips(sets):
    data, keys = sets((100, 100)), Keys()
    whole, _ = take(data, 40)
    state = {**take(data, 0)[1], "samples": 39 * 16}
    assert take(data, 1, state=state, keys=keys)[0] == whole[39:]
    assert len(keys.seen) == 16


def test_a_position_of_another_order_is_refused_by_name(sets):
    data = sets((5, 11))
    _, state = take(data, 2)
    other = DataConfig(streams=8, shuffle=17, workers=0)
    with pytest.raises(UserError, match=r"shuffle differ"):
        take(data, 1, other, state=state)
    with pytest.raises(UserError, match=r"shards differ"):
        take(sets((5, 12)), 1, state=state)
    with pytest.raises(UserError, match=r"seed differ"):
        take(data, 1, seed=4, state=state)


def test_another_global_batch_goes_on_at_the_same_sample(sets):
    data = sets((5, 11))
    whole, _ = take(data, 6, each=1)
    _, state = take(data, 1, each=2)
    assert take(data, 4, each=1, state=state)[0] == whole[2:]


def test_a_bad_sample_is_counted_and_replaced_and_all_others_keep_their_places(sets, caplog):
    data = sets((20, 20))
    good, _ = take(data, 10)
    bad = frozenset({"s0-0003", "s1-0007", "s1-0008"})
    feed = Feed(data, DataConfig(streams=8, shuffle=16, workers=0), 16, 0, 1, 3, Keys(bad), Rows)
    got = [list(batch) for batch in islice(feed, 10)]
    for before, after in zip(flat(good), flat(got), strict=True):
        assert after == before if before[0] not in bad else after[0] not in bad and after[1] == before[1]
    assert feed.tally.counts == {"it is bad": 3}
    assert len([r for r in caplog.records if "it is bad" in r.message]) == 1
    assert any(key in caplog.text for key in bad)
    layout = [as_workers(data, 10, 2, world=2, rank=rank, keys=Keys(bad)) for rank in range(2)]
    assert [flat(parts) for parts in zip(*layout, strict=True)] == got


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_good_sample_ends_in_a_sentence(sets, workers):
    data = sets((3, 4))
    everything = frozenset(key for shard in data.shards for key in shard.keys)
    config = DataConfig(streams=2, shuffle=0, workers=workers)
    with pytest.raises(UserError, match=r"^none of the 7 samples of the shards can be used \(it is bad\)$"):
        take(data, 1, config, keys=Keys(everything))


def test_one_good_sample_is_enough(sets):
    data = sets((3, 4))
    bad = frozenset(key for shard in data.shards for key in shard.keys) - {"s1-0002"}
    got, _ = take(data, 3, keys=Keys(bad))
    assert {key for batch in got for key, _, _ in batch} == {"s1-0002"}


@pytest.mark.parametrize(
    ("config", "batch", "world", "numbers"),
    [
        (DataConfig(streams=8), 12, 1, "global batch 12 is not a multiple of data.streams=8"),
        (DataConfig(streams=8, workers=1), 24, 3, "data.streams=8 is not a multiple of 3 processes x 1 workers = 3"),
        (DataConfig(streams=4, workers=4), 8, 2, "2 processes x 4 workers = 8"),
        (DataConfig(streams=0), 8, 1, "data.streams=0"),
        (DataConfig(workers=-1), 8, 1, "data.workers=-1"),
    ],
)
def test_numbers_that_do_not_fit_are_named(sets, config, batch, world, numbers):
    with pytest.raises(UserError, match=numbers):
        Feed(sets((5,)), config, batch, 0, world, 0, Keys(), Rows)


def test_in_order_is_one_pass_that_skips_what_is_bad(sets):
    data = sets((3, 0, 4))
    keys = [key for shard in data.shards for key in shard.keys]
    got = list(in_order(data, Keys(frozenset(keys[:2])), Rows, 2))
    assert [[key for key, _, _ in batch] for batch in got] == [keys[2:4], keys[4:6], keys[6:]]
    assert [row[0] for batch in in_order(data, Keys(), Rows, 4, start=3) for row in batch] == keys[3:]
    with pytest.raises(UserError, match="none of the 7"):
        list(in_order(data, Keys(frozenset(keys)), Rows, 2))


def test_the_plan_names_the_numbers(sets):
    config = DataConfig(streams=4, shuffle=9, workers=2)
    text = Feed(sets((3, 0, 4)), config, 8, 0, 2, 0, Keys(), Rows).describe()
    for part in ("3 shards", "7 samples", "4 streams", "2 processes x 2 workers", "0.9 global batches"):
        assert part in text
    filtered = replace(sets((3, 0, 4)), filtered=5)
    assert "5 filtered out" in Feed(filtered, config, 8, 0, 2, 0, Keys(), Rows).describe()


def test_a_resumed_pass_that_finds_only_bad_samples_has_found_good_ones_before(sets):
    data = sets((3, 0, 4))
    bad = Keys(frozenset(data.shards[2].keys))
    assert list(in_order(data, bad, Rows, 2, start=3)) == []
    assert [row[0] for batch in in_order(data, Keys(), Rows, 2, start=1, stop=4) for row in batch] == [
        "s0-0001",
        "s0-0002",
        "s2-0000",
    ]
