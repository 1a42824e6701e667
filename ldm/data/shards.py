"""Shards: which tar files a configuration names, what each holds, and how one sample is read out of them.

A shard is a plain tar in WebDataset's naming: members that share a name up to the last dot are one sample, the rest
of the name says what the member is (`000017.webp`, `000017.txt`, `000017.json`). Members of a sample need not be
neighbours, and a name may hold dots (`photo.v1.2.webp` has the key `photo.v1.2`).

Each tar is indexed once, from its headers, and samples are then read by offset. We do not iterate tars as the
webdataset library does, since order and resumption are ours: with an index, the order of samples is a function of
(seed, position) alone (streams.py), a run resumes anywhere without reading what it skips, and what is incomplete is
known before training begins. The library reads our shards all the same. Who adds remote stores replaces `index_shard`
and `ShardReader`; nothing else opens a shard.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import braceexpand

from ldm.errors import UserError, explain_os_error

logger = logging.getLogger(__name__)

OPEN_FILES = 32  # shards a reader keeps open


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard: `fields` maps a member's extension (lower case, no dot) to its bytes."""

    key: str
    shard: str
    fields: Mapping[str, bytes]


class BadSample(Exception):
    """This sample cannot be used; the message is the reason, the same words for the same kind of fault."""


class Tally:
    """Counts the samples that could not be used, by reason; the first of each reason is logged with its key."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, reason: str, key: str, shard: str) -> None:
        if reason not in self.counts:
            logger.warning("leaving out samples: %s (the first is '%s' in %s)", reason, key, shard)
        self.counts[reason] += 1

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.counts.most_common())


Members = dict[str, tuple[int, int]]  # extension -> (offset of the first byte, size)


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds: `keys[i]` and `members[i]` describe sample i, in the order of the samples' first members."""

    path: Path
    keys: tuple[str, ...]
    members: tuple[Members, ...]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class ShardSet:
    """Several shards in a fixed order; the samples in them are numbered through, 0 <= id < len(set)."""

    shards: tuple[ShardIndex, ...]
    left_out: Counter[str]  # samples that the index already shows to be unusable, by reason
    filtered: int  # samples that `where` leaves out

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def counts(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, number within it) of a sample id."""
        shard = bisect_right(self.firsts, sample) - 1
        return shard, sample - self.firsts[shard]

    @cached_property
    def firsts(self) -> list[int]:
        """The id of each shard's first sample (of an empty shard: of the next one's)."""
        return list(accumulate(self.counts[:-1], initial=0))

    @property
    def fingerprint(self) -> str:
        """Names the samples and their order; the folder the shards lie in does not matter."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([shard.path.name, shard.keys]).encode())
        return digest.hexdigest()


def expand(patterns: str, what: str = "data.shards") -> list[Path]:
    """The files that `patterns` names: globs and braces, several separated by commas or white space.

    Commas inside braces belong to the brace; a path or glob with spaces may stand alone. Files keep the order of the
    patterns, sorted within each glob, each file once. Raises UserError for an empty setting and for a pattern without
    a match; `what` names the setting.
    """
    found: dict[Path, None] = {}
    alone = _matching(patterns)
    for pattern in [patterns] if alone else re.findall(r"(?:\{[^{}]*\}|[^\s,])+", patterns):
        try:
            names = [pattern] if alone else list(braceexpand.braceexpand(pattern, escape=False))
        except ValueError as error:
            raise UserError(
                f"{what}: the braces of '{pattern}' do not match; write them like x-{{0..9}}.tar"
            ) from error
        for name in names:
            matches = _matching(name)
            if not matches:
                raise UserError(f"{what}: no file matches '{name}'; check the path")
            found.update((Path(match), None) for match in matches)
    if not found:
        raise UserError(f"{what} names no shards; set it to tar files, for example {what}='data/train-*.tar'")
    return list(found)


def _matching(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of a tar, once for as long as the file stays as it is.

    Of a torn tar, what is whole is kept and a warning names the shard. Raises UserError when the file cannot be read
    or is no tar at all.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise explain_os_error(error, f"reading the shard {path}") from error
    return _index(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _index(path: Path, size: int, modified: int) -> ShardIndex:
    samples: OrderedDict[str, Members] = OrderedDict()
    try:
        with open(path, "rb") as file:
            end = _read_members(file, size, samples)
            file.seek(end)
            torn = file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
    except OSError as error:
        raise explain_os_error(error, f"reading the shard {path}") from error
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a tar file ({error}); remove it from the shards or make it again") from error
    if torn:
        _drop_torn_sample(samples)
        logger.warning(
            "%s is torn at byte %d of %d: its %d whole samples are used, what followed is lost; make it again",
            path, min(end, size), size, len(samples),
        )  # fmt: skip
    return ShardIndex(path, tuple(samples), tuple(samples.values()))


def _read_members(file: BinaryIO, size: int, samples: OrderedDict[str, Members]) -> int:
    """Fill `samples` and return the offset behind the last whole member, where a sound tar has a block of zeros."""
    end, twice = 0, False
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.ReadError:  # the padding of the last member is cut off
                return end
            if member is None or member.offset_data + member.size > size:
                return end
            blocks = -(-member.size // tarfile.BLOCKSIZE)
            end = member.offset_data + blocks * tarfile.BLOCKSIZE
            if member.isfile():
                key, _, extension = member.name.rpartition(".")
                if key and not os.path.basename(member.name).startswith("."):
                    sample = samples.setdefault(key, {})
                    if extension.lower() in sample and not twice:
                        twice = True
                        logger.warning("%s has two members '%s'; the later of such is used", file.name, member.name)
                    sample[extension.lower()] = (member.offset_data, member.size)


def _drop_torn_sample(samples: OrderedDict[str, Members]) -> None:
    """Forget the last sample of a torn shard unless it has all members of the first, to which it is compared."""
    if samples:
        first, last = next(iter(samples)), next(reversed(samples))
        if first == last or not samples[last].keys() >= samples[first].keys():
            del samples[last]


def open_set(
    patterns: str,
    what: str,
    fault: Callable[[Members], str | None],
    where: Mapping[str, Sequence[str]] | None = None,
) -> ShardSet:
    """Index the shards that `patterns` names and keep the samples that can be used.

    `fault` says from a sample's members alone why it cannot be used (None: it can). `where` keeps the samples whose
    json has, for every field named, one of the values (numbers and booleans in JSON's spelling; of a list, any
    item). Raises UserError when nothing is left, with the reasons.
    """
    tally, filtered, shards = Tally(), 0, []
    for path in expand(patterns, what):
        index = index_shard(path)
        kept: list[int] = []
        reader = ShardReader([index])
        for i, (key, members) in enumerate(zip(index.keys, index.members, strict=True)):
            reason = fault(members)
            if reason is not None:
                tally.note(reason, key, str(path))
            elif where and not _matches(reader.member(0, i, "json"), where):
                filtered += 1
            else:
                kept.append(i)
        reader.close()
        keys, members = (tuple(column[i] for i in kept) for column in (index.keys, index.members))
        shards.append(ShardIndex(path, keys, members))  # type: ignore[arg-type]
    made = ShardSet(tuple(shards), tally.counts, filtered)
    if len(made) == 0 and filtered:
        raise UserError(f"none of the {filtered} samples of {what} matches data.where={dict(where or {})}")
    if len(made) == 0:
        raise UserError(f"{what} ({patterns}) has no sample that can be used ({str(tally) or 'the shards are empty'})")
    return made


def _matches(content: bytes | None, where: Mapping[str, Sequence[str]]) -> bool:
    try:
        meta = json.loads(content or b"{}")
    except ValueError:
        return False
    return isinstance(meta, dict) and all(_spelled(meta.get(name)) & set(values) for name, values in where.items())


def _spelled(value: object) -> set[str]:
    items = value if isinstance(value, list) else [value]
    return {item if isinstance(item, str) else json.dumps(item) for item in items}


class ShardReader:
    """Reads samples by (shard, number). Each process makes its own: open files must not be shared across a fork."""

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self._shards = shards
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, shard: int, number: int) -> Record:
        """All members of a sample. Raises BadSample when the shard has changed or vanished since it was indexed."""
        index = self._shards[shard]
        fields = {extension: self._bytes(shard, *place) for extension, place in index.members[number].items()}
        return Record(index.keys[number], str(index.path), fields)

    def member(self, shard: int, number: int, extension: str) -> bytes | None:
        """One member of a sample, None where it has none."""
        place = self._shards[shard].members[number].get(extension)
        return None if place is None else self._bytes(shard, *place)

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            file = self._files.get(shard)
            if file is None:
                file = open(self._shards[shard].path, "rb", buffering=0)  # noqa: SIM115 - closed when it falls out
                self._files[shard] = file
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(shard)
            file.seek(offset)
            content = file.read(size)
        except OSError as error:
            raise BadSample(f"its shard cannot be read ({error.strerror})") from error
        if content is None or len(content) != size:
            raise BadSample("its shard was cut short after the run began")
        return content
