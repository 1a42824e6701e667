"""`tools/benchmark.py data`: samples/s from tar to tensor, beside plain webdataset and torch's ImageFolder.

Like against like: the same JPEG pictures in the same shards (for ImageFolder: as files), decoded by Pillow, cropped and
resized by the same function, in batches of the same size from as many workers. webdataset is used as its own readme
does: shards shuffled, a shuffle buffer, batches made in the workers. All read from the page cache.

The three take turns. Rates are wall-clock; with no workers, the processor's seconds are counted too.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from turns import ratios, spread, take_turns

from ldm.arguments import COUNT, NATURAL

OURS, PLAIN, FOLDER = "ldm", "webdataset", "ImageFolder"


def add_commands(commands: Any) -> argparse.ArgumentParser:
    data = commands.add_parser("data", help="samples/s from tar to tensor, beside webdataset and ImageFolder")
    data.add_argument("--pictures", type=COUNT, default=2000, help="in all")
    data.add_argument("--per-shard", type=COUNT, default=250)
    data.add_argument("--picture-side", type=COUNT, default=320, help="shorter side of the JPEGs, pixels")
    data.add_argument("--size", type=COUNT, default=256, help="of the tensors, pixels")
    data.add_argument("--batch", type=COUNT, default=32)
    data.add_argument("--batches", type=COUNT, default=20, help="that are timed in each turn")
    data.add_argument("--rounds", type=COUNT, default=5)
    data.add_argument("--workers", type=NATURAL, nargs="+", default=[0, 1, 2])
    data.add_argument("--seek", type=NATURAL, default=10_000, help="samples in the shard in which seeking is measured")
    return data


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rates and of the ratios over rounds, for each number of workers; and the seconds of seeking."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_pictures(folder, arguments)
        figures: dict[str, Any] = {"pictures": arguments.pictures, "size": arguments.size, "batch": arguments.batch}
        for workers in arguments.workers:
            sides = {
                OURS: lambda workers=workers: ours(shards, arguments, workers),
                PLAIN: lambda workers=workers: plain(shards, arguments, workers),
                FOLDER: lambda workers=workers: image_folder(folder / "files", arguments, workers),
            }
            figures[f"{workers} workers"] = compare(sides, arguments, workers)
        if arguments.seek:
            figures["seek"] = seek(folder, arguments.seek)
    return figures


def compare(
    sides: dict[str, Callable[[], Iterator[Any]]], arguments: argparse.Namespace, workers: int
) -> dict[str, Any]:
    def opened(name: str) -> Iterator[Any]:
        batches = sides[name]()
        for _ in range(2 + 4 * workers):  # made before the clock starts
            next(batches)
        return batches

    def ready(name: str) -> Callable[[], None]:
        batches = running[name] if running else opened(name)
        return lambda: deque(islice(batches, arguments.batches), maxlen=0).clear()

    running = {name: opened(name) for name in sides} if workers == 0 else {}  # idle readers take no time
    wall, cpu = take_turns({name: partial(ready, name) for name in sides}, arguments.rounds)
    count = arguments.batch * arguments.batches
    made: dict[str, Any] = {}
    for name in sides:
        made[name] = {"samples_per_second": count / statistics.median(wall[name])}
        line = f"{workers} workers  {name:12s}{made[name]['samples_per_second']:8.1f} samples/s"
        if name != OURS:
            found = ratios(wall, OURS, name)
            made[name]["ours_over_it"] = statistics.median(found)
            line += f", ours {spread(found, 'x')}"
            if workers == 0:
                made[name]["ours_over_it_by_processor"] = by_cpu = statistics.median(ratios(cpu, OURS, name))
                line += f", by processor {by_cpu:.3f}x"
        if workers == 0:
            made[name]["cpu_ms_per_sample"] = 1e3 * statistics.median(cpu[name]) / count
            line += f", {made[name]['cpu_ms_per_sample']:.3f} ms of processor a sample"
        print(line, flush=True)
    return made


# ---------------------------------------------------------------- the three


def ours(shards: list[Path], arguments: argparse.Namespace, workers: int) -> Iterator[Any]:
    from ldm.config import DataConfig
    from ldm.data.loader import Loader

    config = DataConfig(
        shards=f"{shards[0].parent}/*.tar", size=arguments.size, streams=arguments.batch, shuffle=1000, workers=workers
    )
    return iter(Loader(config, arguments.batch))


def plain(shards: list[Path], arguments: argparse.Namespace, workers: int) -> Iterator[Any]:
    import torch
    import webdataset

    from ldm.data import transforms

    def made(sample: tuple[Any, str]) -> tuple[torch.Tensor, str]:
        return transforms.prepare(sample[0], arguments.size, "center", False, random.Random(0)).image, sample[1]

    dataset = (
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=len(shards))  # type: ignore[attr-defined]
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map(made)
        .batched(arguments.batch, partial=False)
        .repeat()
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, **_prefetch(workers))
    return iter(loader)


def image_folder(folder: Path, arguments: argparse.Namespace, workers: int) -> Iterator[Any]:
    import torch

    from ldm.conditioning.torchvision_ops import declare_missing_operators
    from ldm.data import transforms

    declare_missing_operators()
    from torchvision.datasets import ImageFolder

    def made(picture: Any) -> torch.Tensor:
        return transforms.prepare(picture, arguments.size, "center", False, random.Random(0)).image

    dataset = ImageFolder(str(folder), transform=made)
    options: dict[str, Any] = {"batch_size": arguments.batch, "shuffle": True, "drop_last": True}
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, **options, **_prefetch(workers))
    while True:
        yield from loader


def _prefetch(workers: int) -> dict[str, Any]:
    return {"prefetch_factor": 4, "worker_init_fn": _one_thread} if workers else {}


def _one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


# ---------------------------------------------------------------- pictures, and seeking in them


def make_pictures(folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Smooth random JPEGs, half of them wide, in shards below `folder`/shards and one by one in `folder`/files/all."""
    import numpy as np
    from PIL import Image

    from ldm.data.writing import write_shard

    files = folder / "files" / "all"
    files.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records: list[tuple[str, dict[str, bytes]]] = []
    for i in range(arguments.pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        size = (arguments.picture_side * (4 if i % 2 else 3) // 3, arguments.picture_side)
        out = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        (files / f"{i:06d}.jpg").write_bytes(out.getvalue())
        records.append((f"{i:06d}", {"jpg": out.getvalue(), "txt": b"a picture", "json": b"{}"}))
    shards = []
    for start in range(0, len(records), arguments.per_shard):
        shards.append(folder / "shards" / f"{start:06d}.tar")
        write_shard(shards[-1], records[start : start + arguments.per_shard])
    return shards


def seek(folder: Path, samples: int) -> dict[str, float]:
    """Seconds until the first batch of a run that begins at the start of a shard, and near its end in a later epoch."""
    from ldm.config import DataConfig
    from ldm.data.loader import Loader
    from ldm.data.writing import write_shard

    shard = next(iter(sorted((folder / "shards").iterdir())))
    from ldm.data.shards import ShardReader, index_shard

    record = dict(ShardReader([index_shard(shard)]).read(0, 0).fields)
    path = folder / "seek.tar"
    write_shard(path, ((f"{i:06d}", record) for i in range(samples)))
    config = DataConfig(shards=str(path), size=64, streams=8, workers=0)
    figures = {}
    for name, position in (("from the start", 0), ("after 2.9 epochs", samples * 29 // 10 // 8 * 8)):
        index_shard.__globals__["_index"].cache_clear()
        begun = time.perf_counter()
        loader = Loader(config, 8)
        opened = time.perf_counter()
        loader.load_state_dict({**loader.state_dict(), "samples": position})
        next(iter(loader))
        figures[f"index, {name}"], figures[f"first batch, {name}"] = opened - begun, time.perf_counter() - opened
        seconds = f"indexed in {opened - begun:.2f} s, first batch {time.perf_counter() - opened:.3f} s later"
        print(f"a shard of {samples} samples, {name}: {seconds}", flush=True)
    return figures
