"""The order of samples: exact sharing, sequential streams, a real shuffle."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.streams import Order, keyed_rng

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)
STREAMS, BUFFER, SEED = st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**31)


def sample_at(order: Order, position: int) -> int:
    epoch, lane, row = order.place(position)
    return order.lane(epoch, lane)[row]


@given(COUNTS, STREAMS, BUFFER, SEED, st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_an_epoch_is_each_sample_exactly_once(counts, streams, buffer, seed, epoch):
    order = Order(counts, streams, buffer, seed)
    positions = range(epoch * order.total, (epoch + 1) * order.total)
    assert sorted(sample_at(order, position) for position in positions) == list(range(order.total))


@given(COUNTS, STREAMS, BUFFER, SEED, st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_a_stream_reads_one_lane_of_each_epoch_front_to_back(counts, streams, buffer, seed, epoch):
    order = Order(counts, streams, buffer, seed)
    positions = range(epoch * order.total, (epoch + 1) * order.total)
    for stream in range(streams):
        places = [order.place(position) for position in positions if position % streams == stream]
        assert len({lane for _, lane, _ in places}) <= 1
        assert [row for _, _, row in places] == list(range(len(places)))
        if places:
            assert len(places) == len(order.lane(epoch, places[0][1]))


@given(COUNTS, STREAMS, SEED)
@settings(deadline=None, max_examples=40)
def test_without_a_shuffle_lanes_are_the_shards_end_to_end(counts, streams, seed):
    order = Order(counts, streams, 0, seed)
    assert [i for lane in range(streams) for i in order.lane(0, lane)] == list(range(order.total))


@given(st.integers(1, 200), st.integers(2, 50), SEED)
@settings(deadline=None, max_examples=40)
def test_a_buffer_lets_no_sample_leave_before_it_has_entered(count, buffer, seed):
    order = Order([count], 1, buffer, seed)
    assert all(sample < out + buffer for out, sample in enumerate(order.lane(0, 0)))


@given(COUNTS, STREAMS, BUFFER, SEED)
@settings(deadline=None, max_examples=40)
def test_every_sample_can_stand_in_for_another(counts, streams, buffer, seed):
    order = Order(counts, streams, buffer, seed)
    epoch, lane, row = order.place(0)
    assert sorted(order.substitutes(epoch, lane, row)) == list(range(order.total))


def test_epochs_and_seeds_differ_and_shards_are_shuffled():
    counts = [10] * 20
    lanes = [list(Order(counts, 1, buffer=2, seed=seed).lane(epoch, 0)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(lane) for lane in lanes}) == 4
    for fixed in (0, 1):  # the order of shards, too, changes with the epoch and with the seed
        firsts = {Order(counts, 1, 2, (fixed, i)[fixed]).lane((i, fixed)[fixed], 0)[0] // 10 for i in range(8)}
        assert len(firsts) > 3


def test_a_buffer_of_the_whole_lane_is_a_uniform_permutation():
    firsts = Counter(Order([4], 1, 4, seed).lane(0, 0)[0] for seed in range(4000))
    assert all(abs(firsts[i] - 1000) < 150 for i in range(4))  # 5 standard deviations of 27


def test_keyed_draws_depend_on_the_key_alone_and_look_uniform():
    assert keyed_rng(1, "a", 0).random() == keyed_rng(1, "a", 0).random()
    assert keyed_rng(1, "a", 0).random() != keyed_rng(1, "a", 1).random()
    assert keyed_rng(1, "23", 0).random() != keyed_rng(12, "3", 0).random()
    mean = sum(keyed_rng(0, str(i), 0).random() for i in range(2000)) / 2000
    assert abs(mean - 0.5) < 0.04
