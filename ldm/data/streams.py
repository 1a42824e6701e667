"""The order of samples: a function of (seed, position), whatever the number of processes and workers.

Epoch e puts the shards in an order drawn from (seed, e) and their N samples end to end. That list is cut into V
lanes, contiguous and of N // V or N // V + 1 samples (the first N % V lanes have one more); each lane passes through
a shuffle buffer drawn from (seed, e, lane). Position p of the epoch is row p // V of lane p % V, so the epoch is read
row by row, one sample of each lane, and its N positions are each sample exactly once.

The endless order is epoch after epoch: position g = e N + p. Global batch n holds the positions n G <= g < (n + 1) G;
a batch may straddle two epochs, so what an epoch leaves over opens the next and nothing is dropped.

Stream s is the positions g with g mod V = s. In epoch e it reads the one lane (s - e N) mod V from front to back,
so each stream reads shards sequentially, and all V streams stay exactly in step although lanes differ in length by one.
A process owns V / world whole streams and a worker a share of these, and each global batch (G a multiple of V) takes
G / V samples of each stream: hence the order depends on V, not on who reads. Fewer shards than streams is no
special case, since lanes are cut by samples.

The buffer shuffles sample numbers, not samples. It therefore costs no memory worth mention, and position g is found
without reading anything that comes before it.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate


def keyed_rng(*key: object) -> random.Random:
    """Random numbers that depend on `key` alone: (seed, sample key, epoch) gives the same draws in any process."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=16)
    return random.Random(int.from_bytes(digest.digest(), "big"))


class Order:
    """Positions -> sample ids. `counts` are the samples of each shard, `buffer` the size of a lane's buffer.

    `lanes` of them, of 8 bytes for each sample, are kept at a time: a reader needs one for each stream that it owns.
    """

    def __init__(self, counts: Sequence[int], streams: int, buffer: int, seed: int, lanes: int | None = None) -> None:
        self.counts, self.streams, self.buffer, self.seed = list(counts), streams, buffer, seed
        self.total = sum(counts)
        self._firsts = [0, *accumulate(counts)]
        self._kept = (lanes or streams) + 1
        self._lanes: OrderedDict[tuple[int, int], array[int]] = OrderedDict()

    def place(self, position: int) -> tuple[int, int, int]:
        """(epoch, lane, row) of a position of the endless order."""
        epoch, within = divmod(position, self.total)
        row, lane = divmod(within, self.streams)
        return epoch, lane, row

    def lane(self, epoch: int, lane: int) -> array[int]:
        """The sample ids of a lane in the order in which they are read."""
        known = self._lanes.get((epoch, lane))
        if known is None:
            known = self._shuffled(self._cut(epoch, lane), keyed_rng(self.seed, epoch, "lane", lane))
            self._lanes[epoch, lane] = known
            if len(self._lanes) > self._kept:
                self._lanes.popitem(last=False)
        else:
            self._lanes.move_to_end((epoch, lane))
        return known

    def substitutes(self, epoch: int, lane: int, row: int) -> Iterator[int]:
        """What may stand in for a sample that cannot be used: the epoch's samples, half a lane away first."""
        for distance in range(self.streams):
            ids = self.lane(epoch, (lane + distance) % self.streams)
            for step in range(len(ids)):
                yield ids[(row + len(ids) // 2 + step) % len(ids)]

    def _cut(self, epoch: int, lane: int) -> array[int]:
        """The ids of a lane before its buffer."""
        share, longer = divmod(self.total, self.streams)
        start = lane * share + min(lane, longer)
        stop = start + share + (lane < longer)
        ids: array[int] = array("q")
        passed = 0
        for shard in self._shard_order(epoch):
            count = self.counts[shard]
            low, high = max(start - passed, 0), min(stop - passed, count)
            if low < high:
                ids.extend(range(self._firsts[shard] + low, self._firsts[shard] + high))
            passed += count
        return ids

    def _shard_order(self, epoch: int) -> list[int]:
        order = list(range(len(self.counts)))
        if self.buffer > 0:
            _permute(order, keyed_rng(self.seed, epoch, "shards"))
        return order

    def _shuffled(self, ids: array[int], rng: random.Random) -> array[int]:
        """`ids` as they leave a buffer of `self.buffer` places: each new one takes the place of a random one."""
        if self.buffer < 2:
            return ids
        waiting = list(ids[: self.buffer])
        out: array[int] = array("q")
        for new in ids[self.buffer :]:
            place = int(rng.random() * len(waiting))
            out.append(waiting[place])
            waiting[place] = new
        _permute(waiting, rng)
        out.extend(waiting)
        return out


def _permute(items: list[int], rng: random.Random) -> None:
    """Fisher-Yates on `random()`, whose sequence Python promises to keep (it does not for `shuffle`)."""
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
