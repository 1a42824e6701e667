"""One sample out of a shard, by the index: the files that are open, and the shards not available for a while."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import BinaryIO

from ldm.config import DataConfig
from ldm.data.cache import Store
from ldm.data.fetch import Unreachable
from ldm.data.index import Members, ShardIndex
from ldm.data.records import BadSample, Record, Unavailable, shown
from ldm.data.sources import is_file

logger = logging.getLogger(__name__)

OPEN_FILES = 32  # shards a reader keeps open
QUARANTINE = 1800.0  # seconds until a shard that was not available is tried again
QUARANTINED = "its shard is in quarantine"


class ShardReader:
    """Reads samples by (shard, number). Each process makes its own: open files must not be shared across a fork."""

    def __init__(self, shards: Sequence[ShardIndex], store: Store | None = None) -> None:
        self._shards, self._store = shards, store or Store.of(DataConfig())
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._quarantine: dict[int, float] = {}  # shard -> when it may be tried again

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, shard: int, number: int, bucket: tuple[int, int] | None = None) -> Record:
        """All members of a sample. Raises BadSample when the shard has changed or vanished since it was indexed."""
        index = self._shards[shard]
        fields = {name: self._bytes(shard, *place) for name, place in index.places(number).items()}
        return Record(index.key(number), index.path, fields, bucket)

    def member(self, shard: int, number: int, extension: str) -> bytes | None:
        """One member of a sample, None where it has none."""
        place = self._shards[shard].places(number).get(extension)
        return None if place is None else self._bytes(shard, *place)

    def places(self, shard: int, number: int) -> Members:
        """Where a sample's members lie."""
        return self._shards[shard].places(number)

    def head(self, shard: int, number: int, extension: str, size: int) -> bytes:
        """The first `size` bytes of a member that the sample has, or all if there are less."""
        offset, whole = self._shards[shard].places(number)[extension]
        return self._bytes(shard, offset, min(whole, size))

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            content = os.pread(self._file(shard).fileno(), size, offset)
        except OSError as error:
            raise Unavailable(f"its shard cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise BadSample("its shard was cut short after the run began")
        return content

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.get(shard)
        if file is not None:
            self._files.move_to_end(shard)
            return file
        if time.monotonic() < self._quarantine.get(shard, 0.0):
            raise Unavailable(QUARANTINED)
        while len(self._files) >= OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        source = self._shards[shard].path
        try:
            file = self._store.open(source)
        except Unreachable as error:
            self._quarantine[shard] = time.monotonic() + QUARANTINE
            logger.warning("shard in quarantine: %s (%s)", shown(source), error)
            raise Unavailable(QUARANTINED) from error
        if not is_file(source) and os.fstat(file.fileno()).st_size != self._shards[shard].size:
            file.close()
            self._store.forget(source)
            self._quarantine[shard] = time.monotonic() + QUARANTINE
            logger.warning("shard in quarantine: %s (it is not what its index says; start again)", shown(source))
            raise Unavailable(QUARANTINED)
        self._files[shard] = file
        return file
