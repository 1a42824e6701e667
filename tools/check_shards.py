"""Read a set of shards and say what is in it, before a training does.

    python tools/check_shards.py 'data/train-*.tar'
    python tools/check_shards.py 's3://bucket/train-{000..099}.tar' --workers 8 --picture resolutions.png

Reported are counts, sizes, torn and unreadable shards, bad samples by reason, duplicate keys and pictures, the lengths
of captions, and the pictures' sizes and shapes; with --picture these are drawn too. Each sample is read and decoded as
training would, so what is said here to be bad is what training leaves out. Keys are compared among the shards of one
set, whose names differ in their number only; pictures among all. With --index, each shard gets a file of where its
samples lie: uploaded beside it, that saves a training the transfer of all shards before its first step.
The exit code is 1 if anything is unusable, torn or bad.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import hashlib
import itertools
import os
import random
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ldm.arguments import NATURAL, Bounded, Parser
from ldm.config import DataConfig
from ldm.data import samples
from ldm.data.cache import Store
from ldm.data.fetch import Unreachable
from ldm.data.index import dump, index_file, index_shard
from ldm.data.records import BadSample, shown
from ldm.data.shards import ShardReader
from ldm.data.sources import base_name, expand_sources, is_file
from ldm.data.tars import NotATar
from ldm.errors import UserError
from ldm.files import atomic_write_bytes
from ldm.metrics.plots import new_figure, png
from ldm.workers import pool

CAPTION_EDGES = (0, 10, 20, 40, 80, 160, 320, 640)  # characters; the last bin is open
SIDE_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 2048)  # pixels of the shorter side
SHAPE_EDGES = (0.0, 0.5, 0.67, 0.8, 1.0, 1.0001, 1.25, 1.5, 2.0)  # width / height; one bin is exactly the square
NAMED = 3  # of each kind, how many are named


def main() -> None:
    arguments = parse()
    config = DataConfig(allow_pipe=arguments.allow_pipe, cache=arguments.cache, cache_gb=arguments.cache_gb)
    sources = expand_sources("\n".join(arguments.shards), "the set", config.allow_pipe)
    found = check_shards(sources, Store.of(config), arguments.workers)
    report = join(list(tqdm(found, total=len(sources), unit="shard", disable=not sys.stderr.isatty())))
    print(text(report))
    if arguments.index:
        usable = {shard.source for shard in report.shards if not shard.unusable}
        for source in sources:
            if is_file(source) and source in usable:
                atomic_write_bytes(f"{source}.index", dump(index_shard(Path(source))))
        print("\nwrote an index beside each shard; where they go, their .index files should go too")
    if arguments.picture:
        draw(report, arguments.picture)
        print(f"\nwrote {arguments.picture}")
    if report.bad or any(shard.unusable or shard.torn for shard in report.shards):
        sys.exit(1)


# ---------------------------------------------------------------- one shard


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
    with pool(workers) as readers:
        yield from readers.map(partial(check_shard, store=store), sources)


# ---------------------------------------------------------------- all of them


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
    first: dict[tuple[str, int], tuple[int, int]] = {}
    found = []
    for place, shard in enumerate(shards):
        # train-00000.tar and val-00000.tar may well number their samples alike, train-00001.tar goes on
        among = re.sub(r"\d+(\.tar)?(\?.*)?$", "", shard.source) if name == "keys" else ""
        for number, digest in zip(shard.numbers, getattr(shard, name), strict=True):
            before = first.setdefault((among, digest), (place, number))
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


def draw(report: SetReport, path: Path) -> None:
    """Width against height of the pictures, and the captions' lengths, as a PNG."""
    figure = new_figure(10, 4.5)
    sizes, captions = figure.subplots(1, 2)
    from matplotlib.colors import LogNorm

    width, height = zip(*report.sizes, strict=True)
    most = 1.05 * max(*width, *height)
    counts = sizes.hist2d(width, height, bins=60, range=((0, most), (0, most)), norm=LogNorm(), cmap="viridis")
    figure.colorbar(counts[3], ax=sizes, label="pictures")
    sizes.plot((0, most), (0, most), color="gray", linewidth=0.5)
    sizes.set(xlabel="width, pixels", ylabel="height, pixels", title=f"{report.good} pictures")
    captions.hist(report.captions, bins=60)
    captions.set(xlabel="characters", ylabel="captions", title="caption length")
    atomic_write_bytes(path, png(figure))


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("shards", nargs="+", help="files, globs, braces, URLs, as data.shards takes them")
    parser.add_argument("--workers", type=NATURAL, default=os.cpu_count() or 1, help="processes; 0: this one")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the histograms")
    parser.add_argument("--index", action="store_true", help="write SHARD.index beside each shard that is a file")
    parser.add_argument("--allow-pipe", action="store_true", help="run commands (pipe:...) among the shards")
    parser.add_argument("--cache", default="", help="folder for copies of remote shards")
    parser.add_argument("--cache-gb", type=Bounded(float, 0), default=50.0, help="10^9 bytes that they take")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
