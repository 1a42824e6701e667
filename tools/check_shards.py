"""Read a set of shards and say what is in it, before a training does.

    python tools/check_shards.py 'data/train-*.tar'
    python tools/check_shards.py 's3://bucket/train-{000..099}.tar' --workers 8 --picture resolutions.png

Reported are counts, sizes, torn and unreadable shards, bad samples by reason, duplicate keys and pictures, the lengths
of captions, and the pictures' sizes and shapes; with --picture these are drawn too. With --index, each shard gets a
file of where its samples lie: uploaded beside it, that saves a training the transfer of all shards before its first
step.
The exit code is 1 if anything is unusable, torn or bad.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ldm.arguments import NATURAL, Bounded, Parser
from ldm.config import DataConfig
from ldm.data.cache import Store
from ldm.data.check import SetReport, check_shards, join, text
from ldm.data.index import dump, index_shard
from ldm.data.sources import expand_sources, is_file
from ldm.errors import UserError, run
from ldm.files import atomic_write, atomic_write_bytes


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


def draw(report: SetReport, path: Path) -> None:
    """Width against height of the pictures, and the captions' lengths, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--picture needs matplotlib; pip install -e '.[plot]'") from error
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, captions = figure.subplots(1, 2)
    width, height = zip(*report.sizes, strict=True)
    most = 1.05 * max(*width, *height)
    counts = sizes.hist2d(width, height, bins=60, range=((0, most), (0, most)), norm=LogNorm(), cmap="viridis")
    figure.colorbar(counts[3], ax=sizes, label="pictures")
    sizes.plot((0, most), (0, most), color="gray", linewidth=0.5)
    sizes.set(xlabel="width, pixels", ylabel="height, pixels", title=f"{report.good} pictures")
    captions.hist(report.captions, bins=60)
    captions.set(xlabel="characters", ylabel="captions", title="caption length")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


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
