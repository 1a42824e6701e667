"""Buckets: pictures keep their shape, and each batch is of one shape (Novel AI's aspect ratio bucketing, 2022).

A bucket is a height and a width, multiples of `step` and together about size x size pixels; a picture belongs to the
one nearest to it in log(width / height). The shapes of all pictures are read once, from their headers, when the set is
opened: so which bucket a sample is in, and with it the whole order, is known before the first step.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.data import samples
from ldm.data.shards import BadSample, ShardReader, ShardSet, Tally
from ldm.errors import UserError

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Buckets:
    """`of[i]` is the place in `sizes` of sample i of a set."""

    sizes: tuple[Size, ...]
    of: array[int]

    def describe(self) -> str:
        """A histogram: each width x height with its share of the samples, the widest last."""
        counts = Counter(self.of)
        return ", ".join(f"{w}x{h}: {counts[i]}" for i, (h, w) in enumerate(self.sizes))


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
    """Put the samples of a set into buckets; those whose size cannot be read are left out of it.

    Buckets of less than `least` samples (a global batch) are given up, the smallest first, and their pictures go to
    the nearest that is left.
    """
    tally = Tally()
    shapes: Counter[Size] = Counter()
    found: list[Size] = []
    shards = []
    with ShardReader(data.shards, data.store) as reader:
        for shard, index in enumerate(data.shards):
            kept = []
            for number in range(len(index)):
                try:
                    found.append(samples.picture_size(reader, shard, number))
                    kept.append(number)
                except BadSample as error:
                    tally.note(str(error), index.key(number), index.path)
            shards.append(index.keep(kept))
    if not found:
        raise UserError(f"none of the samples of data.shards has a picture whose size can be read ({tally})")
    shapes.update(found)
    left = list(sizes)
    while True:
        place = {shape: nearest(left, shape) for shape in shapes}
        counts = Counter({i: 0 for i in range(len(left))})
        for shape, count in shapes.items():
            counts[place[shape]] += count
        smallest = min(counts, key=lambda i: (counts[i], i))
        if counts[smallest] >= least or len(left) == 1:
            break
        del left[smallest]
    of = array("H", (place[shape] for shape in found))
    return replace(data, shards=tuple(shards), left_out=data.left_out + tally.counts), Buckets(tuple(left), of)
