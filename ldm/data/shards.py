"""Shards: what those that a configuration names hold.

A shard is a plain tar in WebDataset's naming: members that share a name up to the last dot are one sample, the rest
of the name says what the member is (`000017.webp`, `000017.txt`, `000017.json`). Members of a sample need not be
neighbours, and a name may hold dots (`photo.v1.2.webp` has the key `photo.v1.2`).

Each tar is indexed once, from its headers, and samples are then read by offset (reader.py). We do not iterate tars as
the webdataset library does, since order and resumption are ours: with an index, the order of samples is a function of
(seed, position) alone (streams.py), a run resumes anywhere without reading what it skips, and what is incomplete is
known before training begins. The library reads our shards all the same.

A shard that is not available is in quarantine: named, counted, left out (when the run begins, and then for all of the
run, however often it is resumed) or stood in for by others (later; it is tried again after a while).
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from ldm.config import DataConfig
from ldm.data.cache import Store
from ldm.data.fetch import Unreachable
from ldm.data.index import Members, ShardIndex, index_shard
from ldm.data.reader import ShardReader
from ldm.data.records import BadSample, Record, Tally, Unavailable, shown
from ldm.data.sources import base_name, expand, expand_sources, is_file
from ldm.data.tars import NotATar
from ldm.errors import UserError

__all__ = [
    "BadSample",
    "Members",
    "Record",
    "ShardIndex",
    "ShardReader",
    "ShardSet",
    "Store",
    "Tally",
    "Unavailable",
    "expand",
    "index_shard",
    "open_data",
    "open_set",
]

logger = logging.getLogger(__name__)

TRANSFERS = 8  # remote shards that are fetched at once when a set is opened
SAMPLE_LIMIT = 2**28  # bytes of a sample; each reader holds one at a time
FEW = 100  # a share of bad samples is taken of as many at least: of three, one may be bad


@dataclass(frozen=True)
class Lost:
    """A shard that is not in a set."""

    source: str
    why: str


@dataclass(frozen=True)
class Part:
    """Neighbouring shards of a mixture, and the share of all samples that are drawn from them."""

    shards: range
    share: float


@dataclass(frozen=True)
class ShardSet:
    """Several shards in a fixed order; the samples in them are numbered through, 0 <= id < len(set)."""

    shards: tuple[ShardIndex, ...]
    left_out: Counter[str]  # samples that the index already shows to be unusable, by reason
    filtered: int  # samples that `where` leaves out
    names: tuple[str, ...]  # of the shards, each another one
    quarantine: Mapping[str, Lost] = field(default_factory=dict)  # name -> a shard that was not available
    store: Store = field(default_factory=lambda: Store.of(DataConfig()))
    mixture: tuple[Part, ...] = ()  # empty: it is none
    keys_are_addresses: bool = False  # the keys name the shards that their samples first were in

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.mixture or (Part(range(len(self.shards)), 1.0),)

    @cached_property
    def counts(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, number within it) of a sample id."""
        shard = bisect_right(self.firsts, sample) - 1
        return shard, sample - self.firsts[shard]

    def address(self, shard: int, number: int) -> str:
        """What names a sample in the whole set, "train-0003/00017": keys do so within their shard only.

        Whatever is random about a sample is drawn from it, so that 00017 of two shards are two samples. It holds no
        folder, for shards may move.
        """
        key = self.shards[shard].key(number)
        return key if self.keys_are_addresses else f"{self.names[shard]}/{key}"

    def without(self, names: Collection[str], why: str) -> ShardSet:
        """This set with these shards in quarantine."""
        left = [i for i, name in enumerate(self.names) if name not in names]
        lost = {name: Lost(self.shards[i].path, why) for i, name in enumerate(self.names) if name in names}
        parts, first = [], 0
        for part in self.mixture:
            count = sum(i in part.shards for i in left)
            parts.append(Part(range(first, first + count), part.share))
            first += count
        return replace(
            self,
            shards=tuple(self.shards[i] for i in left),
            names=tuple(self.names[i] for i in left),
            quarantine={**self.quarantine, **lost},
            mixture=tuple(parts),
        )

    @cached_property
    def firsts(self) -> list[int]:
        """The id of each shard's first sample (of an empty shard: of the next one's)."""
        return list(accumulate(self.counts[:-1], initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """Names the samples and their order; the folder the shards lie in does not matter."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([base_name(shard.path), shard.keys]).encode())
        return digest.hexdigest()


def open_set(
    patterns: str,
    what: str,
    fault: Callable[[Members], str | None],
    where: Mapping[str, Sequence[str]] | None = None,
    config: DataConfig | None = None,
) -> ShardSet:
    """Index the shards that `patterns` names and keep the samples that can be used.

    `fault` says from a sample's members alone why it cannot be used (None: it can). `where` keeps the samples whose
    json has, for every field named, one of the values (numbers and booleans in JSON's spelling; of a list, any
    item). `config` says where copies of remote shards go and how much may be bad. Raises UserError when nothing is
    left, or more is bad than may be, with the reasons.
    """
    return _open(patterns, what, fault, where, config or DataConfig(), Counter())


def _open(
    patterns: str,
    what: str,
    fault: Callable[[Members], str | None],
    where: Mapping[str, Sequence[str]] | None,
    config: DataConfig,
    named: Counter[str],
) -> ShardSet:
    """`open_set`; `named` counts the names that shards have already."""
    store = Store.of(config)
    sources = expand_sources(patterns, what, config.allow_pipe)
    tally, filtered, shards, names = Tally(), 0, [], []
    quarantine: dict[str, Lost] = {}
    for source, index in zip(sources, _indices(store, sources), strict=True):
        name = name_of(source, named)
        found = index
        if isinstance(index, ShardIndex):
            try:
                found, others = _usable(index, store, fault, where, tally)
            except Unavailable as error:  # its index was known, so it was not asked for before
                found = str(error)
            else:
                filtered += others
                shards.append(found)
                names.append(name)
        if isinstance(found, str):
            quarantine[name] = Lost(source, found)
            logger.warning("shard in quarantine: %s (%s)", shown(source), found)
            check_quarantine(quarantine, len(sources), config.bad_limit, what)
    made = ShardSet(tuple(shards), tally.counts, filtered, tuple(names), quarantine, store)
    if len(made) == 0 and filtered:
        raise UserError(f"none of the {filtered} samples of {what} matches data.where={dict(where or {})!s:.200}")
    if len(made) == 0:
        raise UserError(f"{what} ({patterns}) has no sample that can be used ({str(tally) or 'the shards are empty'})")
    check_share(tally, len(made) + filtered + tally.total, config.bad_limit)
    return made


def _usable(
    index: ShardIndex,
    store: Store,
    fault: Callable[[Members], str | None],
    where: Mapping[str, Sequence[str]] | None,
    tally: Tally,
) -> tuple[ShardIndex, int]:
    """The index of the samples that can be used and match, and how many do not match. Raises Unavailable."""
    kept: list[int] = []
    filtered = 0
    with ShardReader([index], store) as reader:
        for i in range(len(index)):
            members = index.places(i)
            reason = fault(members) or _too_large(members)
            if reason is not None:
                tally.note(reason, index.key(i), index.path)
                continue
            try:
                if where and not _matches(reader.member(0, i, "json"), where):
                    filtered += 1
                else:
                    kept.append(i)
            except Unavailable:
                raise
            except BadSample as error:
                tally.note(str(error), index.key(i), index.path)
    return index.keep(kept), filtered


def open_data(config: DataConfig, fault: Callable[[Members], str | None]) -> ShardSet:
    """The shards that `config` trains on: `open_set` of its `shards`, or of each set of its `mixture`."""
    if not config.mixture:
        return open_set(config.shards, "data.shards", fault, config.where, config)
    if config.shards:
        raise UserError("data.shards and data.mixture are both set; keep one of them")
    if not all(0 < share < float("inf") for share in config.mixture.values()):
        raise UserError(f"the shares of data.mixture must be above 0, not {list(config.mixture.values())}")
    whole = sum(config.mixture.values())
    shards: list[ShardIndex] = []
    left_out: Counter[str] = Counter()
    filtered, quarantine, parts, names = 0, {}, [], []
    named: Counter[str] = Counter()
    for patterns, share in config.mixture.items():
        found = _open(patterns, "data.mixture", fault, config.where, config, named)
        parts.append(Part(range(len(shards), len(shards) + len(found.shards)), share / whole))
        shards += found.shards
        names += found.names
        left_out += found.left_out
        filtered += found.filtered
        quarantine |= found.quarantine
    return ShardSet(tuple(shards), left_out, filtered, tuple(names), quarantine, Store.of(config), tuple(parts))


def name_of(source: str, named: Counter[str]) -> str:
    """A shard's name in its set: the file's; of a second one of that name, in another folder, "name~1".

    `named` counts the names that others have, and then this one.
    """
    name = base_name(source).removesuffix(".tar")
    named[name] += 1
    return name if named[name] == 1 else f"{name}~{named[name] - 1}"


def check_quarantine(quarantine: Mapping[str, Lost], of: int, limit: float, what: str = "data.shards") -> None:
    """Raises UserError, with the first names and reasons, when more than `limit` of so many shards are lost."""
    if len(quarantine) > limit * of:
        told = "; ".join(f"{lost.source}: {lost.why}" for lost in list(quarantine.values())[:3])
        raise UserError(
            f"{len(quarantine)} of the {of} shards of {what} cannot be used, more than "
            f"data.bad_limit={limit:g} ({told})"
        )


def check_share(tally: Tally, of: int, limit: float) -> None:
    """Raises UserError, with the reasons, when more than `limit` of so many samples could not be used."""
    if tally.total > limit * max(of, FEW):
        raise UserError(
            f"{tally.total} of {of} samples cannot be used, more than data.bad_limit={limit:g} ({tally}); "
            "tools/check_shards.py lists them"
        )


def _indices(store: Store, sources: Sequence[str]) -> Iterator[ShardIndex | str]:
    """The index of each source, or why it has none; a few transfers are under way at once."""

    def one(source: str) -> ShardIndex | str:
        try:
            if is_file(source):
                return index_shard(store.path(source))
            return store.index(source)
        except (Unreachable, NotATar) as error:
            if isinstance(error, NotATar):
                store.forget(source)  # perhaps it is one next time
            return str(error)
        except UserError as error:
            if not is_file(source):
                raise  # the cache's folder cannot be used
            return str(error)

    if all(map(is_file, sources)):
        yield from map(one, sources)
        return
    with ThreadPoolExecutor(TRANSFERS) as pool:
        yield from pool.map(one, sources)


def _too_large(members: Members) -> str | None:
    return "it is larger than 256 MiB" if sum(size for _, size in members.values()) > SAMPLE_LIMIT else None


def _matches(content: bytes | None, where: Mapping[str, Sequence[str]]) -> bool:
    try:
        meta = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and all(_spelled(meta.get(name)) & set(values) for name, values in where.items())


def _spelled(value: object) -> set[str]:
    items = value if isinstance(value, list) else [value]
    return {item if isinstance(item, str) else json.dumps(item) for item in items}
