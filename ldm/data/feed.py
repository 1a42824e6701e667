"""The stages joined: order -> record -> item -> batch, in this process or in reader processes of its own.

What a `Feed` yields is a function of (shards, seed, position): every process gets global_batch / processes samples of
each global batch, and the rows of a batch are the process' streams in turn. Whatever is random about a sample
(caption, crop, flip) is drawn from (seed, its shard's name and key, epoch), so it does not depend on who reads it.

A sample that turns out to be unusable when it is decoded is counted by reason, and its place is taken by another sample
of the same epoch (streams.Order.substitutes). The places of all others stay what they were. Hence every process takes
the same steps, a position in the order is the whole state, and resuming needs no record of what was bad. Samples
that the index shows to be unusable, and those that `where` leaves out, are not in the order in the first place.
When more than `data.bad_limit` of the samples are unusable, the run stops with the reasons.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.config import DataConfig
from ldm.data.batches import collate, join
from ldm.data.buckets import Buckets
from ldm.data.plan import Group, Plan
from ldm.data.reader import QUARANTINED
from ldm.data.shards import BadSample, Record, ShardReader, ShardSet, Tally, Unavailable, check_share
from ldm.data.streams import keyed_rng
from ldm.errors import UserError

Item = TypeVar("Item")
B = TypeVar("B")


@dataclass(frozen=True)
class Fetched(Generic[Item]):
    """One decoded sample on its way into a batch; `number` is its id in the set, `key` its ShardSet.address."""

    number: int
    key: str
    epoch: int
    item: Item


ENOUGH = 10_000  # samples after which the share of bad ones is judged, or a process' part of an epoch if that is less


Decoder = Callable[[Record, random.Random], Item]  # raises BadSample; it travels to reader processes, so it must pickle

_Bad = tuple[str, str, str]  # reason, key, shard


@dataclass(frozen=True)
class _Part(Generic[B]):
    """What a reader hands over: its share of a batch, or the sentence of the error that ended it."""

    batch: B | None
    bad: list[_Bad]  # since the last part
    error: str = ""


class Feed(Generic[Item, B]):
    """Endless equal batches of `kind`: its columns are the fields of Fetched and of what `decode` makes.

    Raises UserError when the numbers of streams, batch, processes and workers do not fit.

    Iterating goes on where `drawn` stands; only one iteration should be under way at a time.
    """

    def __init__(
        self,
        data: ShardSet,
        config: DataConfig,
        global_batch: int,
        rank: int,
        world: int,
        seed: int,
        decode: Decoder[Item],
        kind: type[B],
        buckets: Buckets | None = None,
    ) -> None:
        check_division(config, global_batch, world)
        self.data, self.config, self.global_batch, self.world, self.seed = data, config, global_batch, world, seed
        self.samples_per_epoch = len(data)
        self.drawn = 0  # samples of the global order handed out so far, over all processes
        self.tally = Tally()
        self.quarantined = {lost.source for lost in data.quarantine.values()}  # shards that were not available
        self.buckets = buckets
        self._decode, self._kind = decode, kind
        self._read = 0  # samples that this process has got
        own = config.streams // world
        self._streams = range(rank * own, (rank + 1) * own)

    def __iter__(self) -> Iterator[B]:
        for part in self._parts():
            self.drawn += self.global_batch
            yield part

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands; the same on every process, and after how many batches each took."""
        return {
            "samples": self.drawn,
            "seed": self.seed,
            "quarantine": sorted(self.data.quarantine),  # when the run began: not in the order
            "order": self._order_name(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with any number of processes and workers, and without reading what it skips.

        What was in quarantine when the run began stays out of the order, whether it is available now or not. Raises
        UserError when the state belongs to other shards, another seed, or another number of streams, and when a shard
        of its order is not available: what it holds is not known then.
        """
        began_without = set(state.get("quarantine", self.data.quarantine))
        lost = [shard for name, shard in self.data.quarantine.items() if name not in began_without]
        if lost:
            raise UserError(
                f"the run goes through {lost[0].source}, which is not available now ({lost[0].why})"
                + (f", nor {len(lost) - 1} others" if len(lost) > 1 else "")
                + "; resume when it can"
            )
        if came_back := began_without & set(self.data.names):
            self._leave_out(came_back)
        here = self._order_name()
        if state["order"] != here or state["seed"] != self.seed:
            ours, theirs = {**here, "seed": self.seed}, {**state["order"], "seed": state["seed"]}
            differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            raise UserError(
                f"the saved position belongs to another order of samples ({', '.join(differing)} differ); resume with "
                "the shards and data settings of that run, or start a new one"
            )
        if state["samples"] % self.config.streams:
            raise UserError(f"the saved position {state['samples']} is not a multiple of {self.config.streams} streams")
        self.drawn = int(state["samples"])

    def describe(self) -> str:
        """The plan that a run prints before its first step: one line, and one for a mixture and for buckets each."""
        data, left_out = self.data, sum(self.data.left_out.values())
        notes = {"filtered out": data.filtered, "unusable": left_out, "shards in quarantine": len(data.quarantine)}
        said = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        lines = [
            f"{len(data.shards)} shards, {self.samples_per_epoch} samples{f' ({said})' if said else ''}, "
            f"{self.config.streams} streams, shuffle {self.config.shuffle}, {self.world} processes x "
            f"{self.config.workers} workers, {self.samples_per_epoch / self.global_batch:.1f} global batches an epoch"
        ]
        if data.mixture:
            counts = [sum(data.counts[part.shards.start : part.shards.stop]) for part in data.mixture]
            shares = zip(self.config.mixture, data.mixture, counts, strict=True)
            lines.append("mixture " + ", ".join(f"{part.share:.1%} of {n} ({name})" for name, part, n in shares))
        if self.buckets:
            lines.append("buckets " + self.buckets.describe())
        return "\n            ".join(lines)

    @property
    def events(self) -> list[str]:
        """What of the batches the log of a run begins with."""
        return [f"buckets {self.buckets.describe()}"] if self.buckets else []

    def histogram(self) -> dict[str, int]:
        """The samples in each bucket, by "width x height" without blanks; empty where pictures have no buckets."""
        return self.buckets.histogram() if self.buckets else {}

    def _leave_out(self, names: set[str]) -> None:
        if names == set(self.data.names):
            raise UserError("every shard was in quarantine when the run began; start a new one")
        data = self.data
        stays = [i for i, name in enumerate(data.names) if name not in names]
        self.data = data.without(names, "it was not available when the run began")
        if self.buckets:
            first = data.firsts
            self.buckets = self.buckets.keep([range(first[i], first[i] + data.counts[i]) for i in stays])
        self.samples_per_epoch = len(self.data)
        self.quarantined |= {data.shards[i].path for i, name in enumerate(data.names) if name in names}

    def _order_name(self) -> dict[str, Any]:
        name: dict[str, Any] = {
            "shards": self.data.fingerprint,
            "streams": self.config.streams,
            "shuffle": self.config.shuffle,
        }
        if self.data.mixture:
            name["mixture"] = [[part.share, len(part.shards)] for part in self.data.mixture]
        if self.buckets:  # a batch of another size is of other rows
            name |= {"buckets": [list(size) for size in self.buckets.sizes], "global batch": self.global_batch}
        return name

    def _parts(self) -> Iterator[B]:
        readers = _Readers(self)
        if self.config.workers == 0:
            for part in readers:
                yield self._opened(part)
        loader = DataLoader(
            readers, batch_size=None, num_workers=self.config.workers, worker_init_fn=_quiet_worker, prefetch_factor=4
        )
        parts = iter(loader)
        while True:  # the DataLoader asks its workers in turn, so the next `workers` parts are one batch
            try:
                got = [next(parts) for _ in range(self.config.workers)]
            except RuntimeError as error:
                if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                    raise
                raise UserError(f"a data worker died ({error}); if memory ran out, lower data.workers") from error
            yield join([self._opened(part) for part in got])

    def _opened(self, part: _Part[B]) -> B:
        for fault in part.bad:
            self.tally.note(*fault)
            if fault[0] == QUARANTINED:
                self.quarantined.add(fault[2])
        self._read += self.global_batch // self.world // max(1, self.config.workers)
        if part.bad:
            check_share(
                self.tally, max(self._read, min(self.samples_per_epoch // self.world, ENOUGH)), self.config.bad_limit
            )
        if part.batch is None:
            raise UserError(part.error)
        return part.batch


class _Readers(IterableDataset, Generic[Item, B]):
    """Yields `_Part`s for ever; in a DataLoader's worker, of the worker's share of the streams."""

    def __init__(self, feed: Feed[Item, B]) -> None:
        self._data, self._decode, self._kind, self._seed = feed.data, feed._decode, feed._kind, feed.seed
        config = feed.config
        self._streams, self._start = feed._streams, feed.drawn // config.streams
        self._rows = feed.global_batch // config.streams
        buffer = -(-config.shuffle // config.streams)
        own = len(feed._streams) // max(1, config.workers)
        self._plan = Plan(feed.data, feed.buckets, config.streams, self._rows, buffer, feed.seed, own)
        self._unusable: set[int] = set()

    def __iter__(self) -> Iterator[_Part[B]]:
        worker = get_worker_info()
        share = len(self._streams) // (worker.num_workers if worker else 1)
        streams = self._streams[worker.id * share :][:share] if worker else self._streams
        reader = SampleReader(self._data, self._decode)
        for first in count(self._start, self._rows):
            bad: list[_Bad] = []
            rows = [self._plan.row(row) for row in range(first, first + self._rows)]
            try:
                samples = [self._fetch(reader, group, row, stream, bad) for stream in streams for group, row in rows]
            except UserError as error:
                yield _Part(None, bad, str(error))
                return
            yield _Part(_batch(self._kind, samples), bad)

    def _fetch(self, reader: SampleReader[Item], group: Group, row: int, stream: int, bad: list[_Bad]) -> Fetched[Item]:
        """The sample of a stream in a row of a group, or the first usable one of its substitutes."""
        order = group.order
        epoch, lane, at = order.place(row * order.streams + stream)
        sample: int = group.ids[order.lane(epoch, lane)[at]]
        substitutes = order.substitutes(epoch, lane, at)
        while True:
            if sample not in self._unusable:
                try:
                    return reader.fetch(sample, epoch, self._seed, group.bucket)
                except BadSample as error:
                    if not isinstance(error, Unavailable):
                        self._unusable.add(sample)
                    bad.append((str(error), *reader.name(sample)))
            try:
                sample = group.ids[next(substitutes)]
            except StopIteration:
                reasons = ", ".join(sorted({reason for reason, _, _ in bad})) or "see the warnings above"
                raise UserError(f"none of the {order.total} samples of the shards can be used ({reasons})") from None


class SampleReader(Generic[Item]):
    """Decoded samples by their number in the set."""

    def __init__(self, data: ShardSet, decode: Decoder[Item]) -> None:
        self._data, self._decode = data, decode
        self._reader = ShardReader(data.shards, data.store)

    def fetch(self, sample: int, epoch: int, seed: int, bucket: tuple[int, int] | None = None) -> Fetched[Item]:
        """Read and decode; the randomness comes from (seed, address, epoch). Raises BadSample."""
        place = self._data.locate(sample)
        record, key = self._reader.read(*place, bucket), self._data.address(*place)
        return Fetched(sample, key, epoch, self._decode(record, keyed_rng(seed, key, epoch)))

    def name(self, sample: int) -> tuple[str, str]:
        """(key, shard), for messages."""
        shard, number = self._data.locate(sample)
        return self._data.shards[shard].key(number), self._data.shards[shard].path


def in_order(
    data: ShardSet, decode: Decoder[Item], kind: type[B], batch_size: int, start: int = 0, stop: int | None = None
) -> Iterator[B]:
    """Every usable sample once, as it lies in the shards, from number `start` to before `stop`; epoch and seed are 0.

    The last batch may be smaller. Raises UserError if none of the samples of the whole set can be used.
    """
    reader = SampleReader(data, decode)
    tally = Tally()
    samples: list[Fetched[Item]] = []
    stop = len(data) if stop is None else stop
    for sample in range(start, stop):
        try:
            samples.append(reader.fetch(sample, epoch=0, seed=0))
        except BadSample as error:
            tally.note(str(error), *reader.name(sample))
        if len(samples) == batch_size:
            yield _batch(kind, samples)
            samples = []
    if samples:
        yield _batch(kind, samples)
    if tally.total == len(data):
        raise UserError(f"none of the {len(data)} samples of the shards can be used ({tally})")


def _batch(kind: type[B], samples: Sequence[Fetched[Any]]) -> B:
    return collate(kind, [(sample, sample.item) for sample in samples])


def _quiet_worker(_: int) -> None:
    """A reader leaves signals to the training process, which saves and then ends its readers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


def check_division(config: DataConfig, global_batch: int, world: int) -> None:
    """Raise UserError when the numbers of streams, batch, processes and workers do not fit."""
    streams, readers = config.streams, world * max(config.workers, 1)
    if streams < 1 or global_batch < 1 or config.workers < 0 or config.shuffle < 0:
        raise UserError(
            f"data.streams={streams} and the global batch {global_batch} must be at least 1, "
            f"data.workers={config.workers} and data.shuffle={config.shuffle} at least 0"
        )
    if global_batch % streams:
        raise UserError(
            f"the global batch {global_batch} is not a multiple of data.streams={streams}; change one of them"
        )
    if streams % readers:
        raise UserError(
            f"data.streams={streams} is not a multiple of {world} processes x {max(config.workers, 1)} workers = "
            f"{readers}; change data.streams or data.workers"
        )
