"""Buckets: pictures keep their shape, and each batch is of one shape (Novel AI's aspect ratio bucketing, 2022).

A bucket is a height and a width, multiples of `step` and together about size x size pixels; a picture belongs to the
one nearest to it in log(width / height). The shapes of all pictures are read from their headers when the set is
opened (of remote shards once: the cache keeps them), so which bucket a sample is in, and with it the whole order, is
known before the first step.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.data import samples
from ldm.data.shards import BadSample, ShardIndex, ShardReader, ShardSet, Store, Tally, Unavailable
from ldm.data.sources import is_file
from ldm.errors import UserError
from ldm.files import atomic_write_bytes

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Shapes:
    """Picture i of a set is of the height and width `kinds[of[i]]`."""

    kinds: list[Size]
    of: array[int]


@dataclass(frozen=True)
class Buckets:
    """`of[i]` is the place in `sizes` of sample i of a set."""

    sizes: tuple[Size, ...]
    of: array[int]
    shapes: Shapes
    wanted: tuple[Size, ...]  # `sizes` before small ones were given up
    least: int

    def histogram(self) -> dict[str, int]:
        """The samples of each bucket, by "width x height", the widest last."""
        counts = Counter(self.of)
        return {f"{w}x{h}": counts[i] for i, (h, w) in enumerate(self.sizes)}

    def describe(self) -> str:
        """The histogram as text."""
        return ", ".join(f"{name}: {count}" for name, count in self.histogram().items())

    def keep(self, samples: Sequence[range]) -> Buckets:
        """The buckets of a set of these samples alone."""
        of: array[int] = array("I")
        for each in samples:
            of.extend(self.shapes.of[each.start : each.stop])
        return fill(Shapes(self.shapes.kinds, of), self.wanted, self.least)


def bucket_sizes(size: int, step: int, aspect: float) -> list[Size]:
    """The buckets, tall to wide: for each width the height that comes nearest to size^2 pixels.

    Sides are multiples of `step`, width / height is from 1 / aspect to aspect. Raises UserError if `size` is none.
    """
    if size % step or aspect < 1:
        raise UserError(
            f"data.size={size} must be a multiple of data.buckets={step}, and data.bucket_aspect={aspect:g} at least 1"
        )
    found: dict[Size, None] = {(size, size): None}
    for short in range(step, size, step):
        long = max(size, round(size * size / short / step) * step)
        if long / short <= aspect:
            found |= {(long, short): None, (short, long): None}
    return sorted(found, key=_shape)


def nearest(sizes: Sequence[Size], picture: Size) -> int:
    """The place in `sizes` of the one whose shape is nearest to the picture's."""
    wanted = _shape(picture)
    return min(range(len(sizes)), key=lambda i: abs(_shape(sizes[i]) - wanted))


def _shape(size: Size) -> float:
    return math.log(size[1] / size[0])


def assign(data: ShardSet, sizes: Sequence[Size], least: int) -> tuple[ShardSet, Buckets]:
    """Put the samples of a set into buckets; those whose size cannot be read are left out of it."""
    data, shapes = measure(data)
    return data, fill(shapes, sizes, least)


def measure(data: ShardSet) -> tuple[ShardSet, Shapes]:
    """Read the shapes of all pictures; samples whose shape cannot be read, and shards that go, are left out."""
    tally = Tally()
    place: dict[Size, int] = {}
    sizes: list[Size] = []
    of: array[int] = array("I")
    shards, gone = [], set()
    with ShardReader(data.shards, data.store) as reader:
        for shard, index in enumerate(data.shards):
            kept, before = [], len(of)
            known = _known(data.store, index)
            for number in range(len(index)):
                try:
                    size = known[number] if known else samples.picture_size(reader, shard, number)
                except Unavailable:
                    gone.add(data.names[shard])
                    del of[before:]
                    break
                except BadSample as error:
                    tally.note(str(error), index.key(number), index.path)
                    continue
                of.append(place.setdefault(size, len(place)))
                if len(place) > len(sizes):
                    sizes.append(size)
                kept.append(number)
            shards.append(index.keep(kept))
            if not known and len(kept) == len(index):  # what is bad is looked at again, and told again
                _remember(data.store, index, [sizes[i] for i in of[before:]])
    data = replace(data, shards=tuple(shards), left_out=data.left_out + tally.counts)
    if gone:
        data = data.without(gone, "it is not available")
    if not of:
        raise UserError(f"none of the samples of data.shards has a picture whose size can be read ({tally})")
    return data, Shapes(sizes, of)


def _known(store: Store, index: ShardIndex) -> list[Size]:
    """The shapes that an earlier start found in a remote shard, which need not be fetched again; [] if none did."""
    path = store.beside(index.path, "shapes")
    if is_file(index.path) or not path.exists():
        return []
    content = path.read_bytes()
    digest = _digest(index)
    if not content.startswith(digest) or len(content) != len(digest) + 8 * len(index):
        return []
    return list(struct.iter_unpack("<II", content[len(digest) :]))


def _remember(store: Store, index: ShardIndex, shapes: Sequence[Size]) -> None:
    if not is_file(index.path):
        packed = b"".join(struct.pack("<II", *shape) for shape in shapes)
        atomic_write_bytes(store.beside(index.path, "shapes"), _digest(index) + packed)


def _digest(index: ShardIndex) -> bytes:
    """Names the samples that the shapes are of."""
    return hashlib.sha256(json.dumps([index.size, index.keys]).encode()).digest()


def fill(shapes: Shapes, sizes: Sequence[Size], least: int) -> Buckets:
    """Each picture's bucket.

    Buckets of less than `least` samples (a global batch) are given up, the smallest first, and their pictures go to
    the nearest that is left.
    """
    samples_of, left = Counter(shapes.of), list(sizes)
    while True:
        place = [nearest(left, shape) for shape in shapes.kinds]
        counts = Counter({i: 0 for i in range(len(left))})
        for kind, count in samples_of.items():
            counts[place[kind]] += count
        smallest = min(counts, key=lambda i: (counts[i], i))
        if counts[smallest] >= least or len(left) == 1:
            break
        del left[smallest]
    return Buckets(tuple(left), array("H", (place[kind] for kind in shapes.of)), shapes, tuple(sizes), least)
