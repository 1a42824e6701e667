"""Which samples a row of the streams takes: one set, a weighted mixture of sets, or buckets of pictures of one shape.

Positions are taken row by row, one of each stream (streams.py). A row is of one *group* of samples, which has an order
and epochs of its own, and its n-th row is always its n-th row: so within a group everything that streams.py promises
holds, and the union over ranks and workers is each sample of the group exactly once an epoch.

- A mixture has a group for each set. Rows go to the sets in proportion to their shares.
- Buckets are groups of pictures of one shape. A global batch is rows of one bucket, for all ranks alike, and batches
  go to the buckets in proportion to their samples, so the buckets' epochs keep step. What is left over of a bucket
  opens its next epoch.
- In both at once, batches go to buckets and a bucket's rows to the sets in it.

Which group a row belongs to is a function of its number alone (`Interleave`), so seeking takes no time here either.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.data.buckets import Buckets
from ldm.data.shards import ShardSet
from ldm.data.streams import Order

RESOLUTION = 10**9  # in which shares of a mixture are counted


class Interleave:
    """Turns of several players in proportion to whole `weights`, as evenly as can be.

    Player i's k-th turn (from 0) is due at the time (k + 1/2) / weight; turns are taken as they fall due, of those at
    one time the first player's first. After n turns a player has had its share of n to within (players + 1) / 2.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = list(weights)
        self._sum = sum(weights)

    def turn(self, n: int) -> tuple[int, int]:
        """(player, how many turns it had before) of turn n."""
        weights, players = self._weights, len(self._weights)
        if players == 1:
            return 0, n
        # All that fall due before the time (n - players) / sum are less than n: begin there.
        begin = max(0, n - players)
        taken = [max(0, -((self._sum - 2 * weight * begin) // (2 * self._sum))) for weight in weights]
        left = n - sum(taken)
        while True:
            best = 0
            for player in range(1, players):
                if (2 * taken[player] + 1) * weights[best] < (2 * taken[best] + 1) * weights[player]:
                    best = player
            if left == 0:
                return best, taken[best]
            taken[best] += 1
            left -= 1


@dataclass(frozen=True)
class Group:
    """Samples with an order of their own: `ids` are their numbers in the set, in the order of the shards."""

    ids: Sequence[int]
    order: Order
    bucket: tuple[int, int] | None  # height and width of its pictures


class Plan:
    """Row -> group. `rows` are those of a global batch, `buffer` the samples in the shuffle buffer of a stream."""

    def __init__(
        self,
        data: ShardSet,
        buckets: Buckets | None,
        streams: int,
        rows: int,
        buffer: int,
        seed: int,
        lanes: int | None = None,
    ) -> None:
        self._rows = rows
        self.groups: list[Group] = []
        outer: list[int] = []
        self._inner: list[tuple[int, Interleave]] = []  # of each bucket: its first group, turns of its groups
        for bucket in range(len(buckets.sizes) if buckets else 1):
            first, weights = len(self.groups), []
            for part in data.parts:
                ids, counts = _members(data, buckets, bucket, part.shards)
                if not ids:
                    continue
                order = Order(counts, streams, buffer, seed, lanes)
                self.groups.append(Group(ids, order, buckets.sizes[bucket] if buckets else None))
                whole = sum(data.counts[part.shards.start : part.shards.stop])
                weights.append(
                    len(ids) if len(data.parts) == 1 else max(1, round(RESOLUTION * part.share * len(ids) / whole))
                )
            outer.append(sum(weights))
            self._inner.append((first, Interleave(weights)))
        self._outer = Interleave(outer)

    def row(self, n: int) -> tuple[Group, int]:
        """The group of row n of all rows, and which of the group's own rows it is."""
        batch, within = divmod(n, self._rows)
        bucket, batches = self._outer.turn(batch)
        first, turns = self._inner[bucket]
        player, row = turns.turn(batches * self._rows + within)
        return self.groups[first + player], row


def _members(data: ShardSet, buckets: Buckets | None, bucket: int, shards: range) -> tuple[Sequence[int], list[int]]:
    """The numbers of the samples of `shards` that are in a bucket, and how many each shard has of them."""
    if not shards:
        return shards, []
    counts = [data.counts[shard] for shard in shards]
    first = data.firsts[shards.start]
    everything = range(first, first + sum(counts))
    if buckets is None:
        return everything, counts
    ids: array[int] = array("q")
    own = []
    for shard, count in zip(shards, counts, strict=True):
        before = len(ids)
        start = data.firsts[shard]
        ids.extend(i for i in range(start, start + count) if buckets.of[i] == bucket)
        own.append(len(ids) - before)
    return ids, own
