"""What a shard holds: the keys of its samples and where their members lie: for a sample of three members the
letters of its key and some 33 bytes.

The arrays are shared by all readers that a process forks, since nothing in them counts references.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ldm.data.records import shown
from ldm.data.tars import BLOCK, NotATar, read_headers
from ldm.errors import UserError, explain_os_error

logger = logging.getLogger(__name__)

FORMAT = "ldm-index-1"

Members = dict[str, tuple[int, int]]  # extension -> (offset of the first byte, size)


class ShardIndex:
    """`keys[i]` and `members[i]` describe sample i, in the order of the samples' first members."""

    def __init__(self, path: str, samples: OrderedDict[str, Members], torn: bool = False, size: int = 0) -> None:
        self.path, self.torn, self.size = path, torn, size  # size: bytes of the tar
        self._kept: array[int] | None = None  # the samples that are used; None: all
        self._names = b"".join(key.encode("utf-8", "surrogateescape") for key in samples)
        ends: array[int] = array("Q")
        self._extensions: list[tuple[str, ...]] = []  # what members a sample may have; `_kind` says which sample has
        kind_of: array[int] = array("Q")
        first: array[int] = array("Q")
        offsets: array[int] = array("Q")
        sizes: array[int] = array("Q")
        kinds: dict[tuple[str, ...], int] = {}
        end = 0
        for key, members in samples.items():
            end += len(key.encode("utf-8", "surrogateescape"))
            ends.append(end)
            kind = kinds.setdefault(tuple(members), len(kinds))
            if kind == len(self._extensions):
                self._extensions.append(tuple(members))
            kind_of.append(kind)
            first.append(len(offsets))
            for offset, length in members.values():
                offsets.append(offset)
                sizes.append(length)
        self._unit = 1 if any(offset % BLOCK for offset in offsets) else BLOCK  # a tar's members begin at whole blocks
        self._name_ends, self._kind = _narrow(ends), _narrow(kind_of)
        self._first = _narrow(first)  # where a sample's members begin in the two that follow
        self._offsets, self._sizes = _narrow(array("Q", (offset // self._unit for offset in offsets))), _narrow(sizes)

    def __len__(self) -> int:
        return len(self._kind) if self._kept is None else len(self._kept)

    def key(self, number: int) -> str:
        at = self._at(number)
        start = self._name_ends[at - 1] if at else 0
        return self._names[start : self._name_ends[at]].decode("utf-8", "surrogateescape")

    def places(self, number: int) -> Members:
        """Extension -> (offset, size) of the members of a sample."""
        at = self._at(number)
        first = self._first[at]
        extensions = self._extensions[self._kind[at]]
        return {
            extension: (self._offsets[first + i] * self._unit, self._sizes[first + i])
            for i, extension in enumerate(extensions)
        }

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(map(self.key, range(len(self))))

    @property
    def members(self) -> tuple[Members, ...]:
        return tuple(map(self.places, range(len(self))))

    def keep(self, numbers: Sequence[int]) -> ShardIndex:
        """This index with these samples alone."""
        made = object.__new__(ShardIndex)
        made.__dict__.update(self.__dict__)
        if len(numbers) < len(self):
            made._kept = array("I", map(self._at, numbers))
        return made

    def _at(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return number if self._kept is None else self._kept[number]


def _narrow(values: array[int]) -> array[int]:
    """The same numbers in the fewest bytes each."""
    largest = max(values, default=0)
    return array(next(code for code in "BHIQ" if largest < 256 ** array(code).itemsize), values)


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of a tar, once for as long as the file stays as it is.

    Members that share a name up to the last dot are one sample. Of a torn tar, what is whole is kept and a warning
    names the shard. Raises UserError when the file cannot be read or is no tar at all.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise explain_os_error(error, f"reading the shard {path}") from error
    return _index(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _index(path: Path, size: int, modified: int) -> ShardIndex:
    try:
        with open(path, "rb", buffering=0) as file:
            return index_file(file.fileno(), str(path))
    except OSError as error:
        raise explain_os_error(error, f"reading the shard {path}") from error
    except NotATar as error:
        raise UserError(f"{path} is not a tar file ({error}); remove it from the shards or make it again") from error


def index_file(file: int, path: str) -> ShardIndex:
    """`index_shard` of an open file that is known as `path`. Raises NotATar and OSError."""
    size = os.fstat(file).st_size
    contents = read_headers(file, size)
    samples: OrderedDict[str, Members] = OrderedDict()
    twice = False
    for name, offset, length in contents.members:
        key, _, extension = name.rpartition(".")
        if not key or os.path.basename(name).startswith("."):
            continue
        sample = samples.setdefault(key, {})
        if extension.lower() in sample and not twice:
            twice = True
            logger.warning("%s has two members '%s'; the later of such is used", shown(path), shown(name))
        sample[extension.lower()] = (offset, length)
    if contents.torn:
        _drop_torn_sample(samples)
        logger.warning(
            "%s is torn at byte %d of %d: its %d whole samples are used, what followed is lost; make it again",
            shown(path), min(contents.end, size), size, len(samples),
        )  # fmt: skip
    return ShardIndex(path, samples, contents.torn, size)


def dump(index: ShardIndex) -> bytes:
    """An index as JSON, about a hundred bytes for each sample: what `shard.tar.index` beside a shard holds."""
    samples = [[key, members] for key, members in zip(index.keys, index.members, strict=True)]
    return json.dumps({"format": FORMAT, "size": index.size, "torn": index.torn, "samples": samples}).encode()


def parse(content: bytes, path: str) -> ShardIndex | None:
    """The inverse of `dump` for the shard `path`; None for what is none, or names bytes that are not there."""
    try:
        plain = json.loads(content)
        if plain["format"] != FORMAT:
            return None
        size, samples = int(plain["size"]), OrderedDict()
        for key, members in plain["samples"]:
            samples[str(key)] = {str(name): (int(offset), int(length)) for name, (offset, length) in members.items()}
            if any(offset < 0 or length < 0 or offset + length > size for offset, length in samples[key].values()):
                return None
        return ShardIndex(path, samples, bool(plain["torn"]), size)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _drop_torn_sample(samples: OrderedDict[str, Members]) -> None:
    """Forget the last sample of a torn shard unless it has all members of the first, to which it is compared."""
    if samples:
        first, last = next(iter(samples)), next(reversed(samples))
        if first == last or not samples[last].keys() >= samples[first].keys():
            del samples[last]
