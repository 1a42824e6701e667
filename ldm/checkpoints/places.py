"""Where a file keeps its tensors, and tensors that are views of the file: read when they are looked at, held once."""

from __future__ import annotations

import math
import mmap
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError, explain_os_error

CHUNK = 64 << 20  # bytes of a file that are mapped together, at least


@dataclass(frozen=True)
class Place:
    """A tensor in a file: `count` bytes from `start` are a run of items, of which it is the whole or a strided view."""

    start: int
    count: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # in items; None: the whole run, row by row
    offset: int = 0  # in items

    @property
    def bytes(self) -> int:
        """What the tensor takes when it is held by itself."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """What a file holds: its tensors by name, in the file's order, and its words."""

    places: dict[str, Place]
    metadata: dict[str, str]


class MappedFile:
    """A file's runs of bytes as tensors over memory-mapped chunks (private: writing to them never reaches the file).

    A chunk is unmapped with the last tensor over it. So weights that are used as they are stored are held once, and
    those that are converted one by one leave nothing of the file behind. Chunks and not single tensors, since each
    mapping keeps a file descriptor open: there are at most 65 of them.
    """

    def __init__(self, path: Path, size: int, places: Iterable[Place]):
        self.path = path
        self.bounds: list[tuple[int, int]] = []  # first byte and end of each chunk
        least = max(CHUNK, size // 64)
        for start, end in sorted({(place.start, place.start + place.count) for place in places if place.count}):
            if self.bounds and self.bounds[-1][1] - self.bounds[-1][0] < least:
                self.bounds[-1] = (self.bounds[-1][0], max(end, self.bounds[-1][1]))
            else:
                self.bounds.append((start, end))
        self.starts = [start for start, _ in self.bounds]
        self.live: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def tensor(self, place: Place) -> Tensor:
        """The tensor at `place`, over the file's own bytes. Raises UserError if the file has changed meanwhile."""
        if not place.count:
            return torch.empty(place.shape, dtype=place.dtype)
        number = bisect_right(self.starts, place.start) - 1
        first = self.bounds[number][0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = self.live.get(number)
        if mapped is None:
            mapped = self.live[number] = self._map(first, self.bounds[number][1] - first)
        run = torch.frombuffer(mapped, dtype=torch.uint8, count=place.count, offset=place.start - first)
        if place.start % place.dtype.itemsize:
            run = run.clone()  # numbers that begin at an odd byte
        items = run[: place.count // place.dtype.itemsize * place.dtype.itemsize].view(place.dtype)
        if place.stride is None:
            return items.view(place.shape)
        return items.as_strided(place.shape, place.stride, place.offset)

    def _map(self, first: int, count: int) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), count, access=mmap.ACCESS_COPY, offset=first)
        except OSError as error:
            raise explain_os_error(error, f"reading {self.path}") from error
        except ValueError as error:
            raise UserError(f"{self.path} has become shorter while it was read; copy it again") from error
