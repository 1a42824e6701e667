"""What is in a set of shards: counts, sizes, duplicates, what is bad and why, captions, resolutions.

Each sample is read and decoded as training would, so what is said here to be bad is what training leaves out. Kept of a
sample are some 50 bytes, whatever its size.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from ldm.data import samples
from ldm.data.fetch import Unreachable
from ldm.data.index import index_file
from ldm.data.records import BadSample, shown
from ldm.data.shards import ShardReader, Store
from ldm.data.sources import base_name
from ldm.data.tars import NotATar
from ldm.errors import UserError

CAPTION_EDGES = (0, 10, 20, 40, 80, 160, 320, 640)  # characters; the last bin is open
SIDE_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048)  # pixels of the shorter side
SHAPE_EDGES = (0.0, 0.5, 0.67, 0.8, 1.0, 1.0001, 1.25, 1.5, 2.0)  # width / height; one bin is exactly the square
NAMED = 3  # of each kind, how many are named


@dataclass
class ShardReport:
    """One shard; the arrays have an entry for each good sample."""

    source: str
    unusable: str = ""  # why nothing of it can be read
    torn: bool = False
    bytes: int = 0
    samples: int = 0  # good and bad
    bad: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys of the first such samples
    keys: array[int] = field(default_factory=lambda: array("Q"))  # hashes
    pictures: array[int] = field(default_factory=lambda: array("Q"))
    numbers: array[int] = field(default_factory=lambda: array("Q"))  # in the shard
    widths: array[int] = field(default_factory=lambda: array("I"))
    heights: array[int] = field(default_factory=lambda: array("I"))
    captions: array[int] = field(default_factory=lambda: array("I"))  # characters


def check_shard(source: str, store: Store) -> ShardReport:
    """Read and decode everything that a shard holds."""
    report = ShardReport(source)
    try:
        with store.open(source) as file:
            report.bytes = file.seek(0, 2)
            index = index_file(file.fileno(), source)
    except (Unreachable, NotATar, OSError) as error:
        report.unusable = str(error)
        return report
    report.torn, report.samples = index.torn, len(index)
    with ShardReader([index], store) as reader:
        for number in range(len(index)):
            key = index.key(number)
            try:
                reason = samples.fault(index.places(number))
                if reason:
                    raise BadSample(reason)
                record = reader.read(0, number)
                sample = samples.decode(record, "txt", random.Random(0))
            except BadSample as error:
                report.bad[str(error)] += 1
                named = report.named.setdefault(str(error), [])
                if len(named) < NAMED:
                    named.append(key)
                continue
            content = next(record.fields[name] for name in samples.PICTURES if record.fields.get(name))
            report.keys.append(_hash(key.encode("utf-8", "surrogateescape")))
            report.pictures.append(_hash(content))
            report.numbers.append(number)
            report.widths.append(sample.picture.width)
            report.heights.append(sample.picture.height)
            report.captions.append(len(sample.caption))
    return report


def check_shards(sources: Sequence[str], store: Store, workers: int) -> Iterator[ShardReport]:
    """A report of each shard, in order, from `workers` processes (0: this one)."""
    if workers == 0:
        yield from (check_shard(source, store) for source in sources)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(check_shard, store=store), sources)


@dataclass(frozen=True)
class SetReport:
    """All shards together; duplicates are pairs (shard, number) of a sample and the first one that is like it."""

    shards: list[ShardReport]
    equal_keys: list[tuple[tuple[int, int], tuple[int, int]]]
    equal_pictures: list[tuple[tuple[int, int], tuple[int, int]]]

    @property
    def good(self) -> int:
        return sum(len(shard.widths) for shard in self.shards)

    @property
    def bad(self) -> Counter[str]:
        return sum((shard.bad for shard in self.shards), Counter())

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each good sample's picture."""
        return [pair for shard in self.shards for pair in zip(shard.widths, shard.heights, strict=True)]

    @property
    def captions(self) -> list[int]:
        """Characters of each good sample's caption."""
        return [count for shard in self.shards for count in shard.captions]


def join(shards: Sequence[ShardReport]) -> SetReport:
    """Raises UserError if there is no good sample in any of them."""
    made = SetReport(list(shards), _equal(shards, "keys"), _equal(shards, "pictures"))
    if made.good == 0:
        reasons = Counter({shard.unusable: 1 for shard in shards if shard.unusable}) + made.bad
        raise UserError(f"none of the {len(shards)} shards has a sample that can be used ({_counted(reasons)})")
    return made


def text(report: SetReport) -> str:
    """The report as a page of text."""
    shards = [shard for shard in report.shards if not shard.unusable]
    counts, sizes = [shard.samples for shard in shards], [shard.bytes for shard in shards]
    bad = report.bad
    lines = [
        f"shards      {len(report.shards)}, {sum(sizes) / 1e9:.3f} GB; {_spread(sizes, 1e6, ' MB')}",
        f"samples     {sum(counts)}, of which {report.good} good; in a shard {_spread(counts, 1, '')}",
    ]
    for what, found in (
        ("unusable", [(shard.source, shard.unusable) for shard in report.shards if shard.unusable]),
        ("torn", [(shard.source, "what is whole is used") for shard in report.shards if shard.torn]),
    ):
        lines += [f"{what:12s}{shown(base_name(source))}: {why}" for source, why in found]
    for reason, count in bad.most_common():
        names = [key for shard in shards for key in shard.named.get(reason, [])][:NAMED]
        lines.append(f"bad         {count}: {reason} ({', '.join(map(shown, names))}{', ...' * (count > len(names))})")
    for what, pairs in (("key", report.equal_keys), ("picture", report.equal_pictures)):
        places = ", ".join(f"{_place(report, again)} = {_place(report, first)}" for again, first in pairs[:NAMED])
        if pairs:
            lines.append(
                f"duplicates  {len(pairs)} with the {what} of another ({places}{', ...' * (len(pairs) > NAMED)})"
            )
        else:
            lines.append(f"duplicates  no two samples have the same {what}")
    captions, pixels = report.captions, report.sizes
    lines += ["", f"caption length, characters: {_spread(captions, 1, '')}", *_bars(captions, CAPTION_EDGES)]
    lines += ["", f"shorter side, pixels: {_spread([min(size) for size in pixels], 1, '')}"]
    lines += _bars([min(size) for size in pixels], SIDE_EDGES)
    lines += ["", "width / height", *_bars([width / height for width, height in pixels], SHAPE_EDGES)]
    return "\n".join(lines)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _equal(shards: Sequence[ShardReport], name: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    first: dict[int, tuple[int, int]] = {}
    found = []
    for place, shard in enumerate(shards):
        for number, digest in zip(shard.numbers, getattr(shard, name), strict=True):
            before = first.setdefault(digest, (place, number))
            if before != (place, number):
                found.append(((place, number), before))
    return found


def _place(report: SetReport, where: tuple[int, int]) -> str:
    return f"{shown(base_name(report.shards[where[0]].source))}#{where[1]}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "they are empty"


def _spread(values: Sequence[float], unit: float, name: str) -> str:
    ordered = sorted(values)
    least, middle, most = (ordered[i] / unit for i in (0, len(ordered) // 2, -1))
    return f"{least:.4g} to {most:.4g}{name}, median {middle:.4g}"


def _bars(values: Sequence[float], edges: Sequence[float]) -> list[str]:
    """A histogram of text; bin i is edges[i] <= value < edges[i + 1]."""
    counts = Counter(sum(value >= edge for edge in edges) - 1 for value in values)
    longest = max(counts.values())
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g} and more"]
    return [
        f"  {name:16s}{counts[i]:9d}  {'#' * -(-40 * counts[i] // longest)}".rstrip()
        for i, name in enumerate(names)
        if counts[i]
    ]
