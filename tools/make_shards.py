"""Turn a folder of captioned pictures into shards for training.

    python tools/make_shards.py PICTURES --output DIR
    python tools/make_shards.py PICTURES --output DIR --table captions.csv --caption-column text

Without a table, the caption of `a/b.jpg` is `a/b.txt` (UTF-8) or the `caption` of `a/b.json`, whose other fields come
along. With a table (CSV, TSV, JSONL, Parquet), each row names a picture, relative to PICTURES, and its caption; the
other columns come along as json. DIR gets `train-00000.tar`, ... and, with --holdout, `val-00000.tar`, ...

Pictures are sorted by the md5 of their path: shards are mixed, the same on each run, and a picture stays on its side of
the hold-out when others come or go. What cannot be used is left out and listed in DIR/report.json. A run that was
interrupted goes on behind its last whole shard when it is called again; pictures or captions that were changed
meanwhile want a folder of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.arguments import COUNT, NATURAL, Bounded, Parser
from ldm.data import samples
from ldm.data.shards import BadSample, Record
from ldm.data.tables import rows
from ldm.data.writing import write_shard
from ldm.errors import UserError, run
from ldm.files import atomic_write_text, read_text

MANIFEST, REPORT = "shards.json", "report.json"
BESIDE = ("txt", "json")  # the files beside a picture that hold its caption
UNREAD = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl")  # pictures that training does not read


@dataclass(frozen=True)
class Source:
    """A picture before it is read: `name` is its path below the folder, `caption` the table's (None: beside it)."""

    name: str
    path: str
    caption: str | None
    meta: Mapping[str, Any]
    stamps: tuple[tuple[int, int] | None, ...]  # bytes and time of the picture, and of the files beside it that count

    @property
    def digest(self) -> str:
        return hashlib.md5(self.name.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Options:
    """What decides the content of the shards."""

    size: int
    format: str
    quality: int
    per_shard: int
    holdout: float


Made = tuple[str, dict[str, bytes]] | str  # a record, or the reason why there is none


def main() -> None:
    args = _arguments()
    options = Options(args.size, args.format, args.quality, args.per_shard, args.holdout)
    if args.table:
        sources = from_table(args.pictures, args.table, args.image_column, args.caption_column)
    else:
        sources = from_folder(args.pictures)
    report = make_shards(sources, args.output, options, args.workers)
    print(f"{report['samples']} samples in {len(report['shards'])} shards in {args.output}")
    for reason, names in report["left_out"].items():
        print(f"left out {len(names)}: {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if report["left_out"]:
        print(f"all of them are listed in {args.output / REPORT}")
    if not report["samples"]:
        raise UserError("none of the pictures can be used; the reasons are above")


# ---------------------------------------------------------------- what there is


def from_folder(folder: Path) -> list[Source]:
    """All pictures below `folder`; raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the one that holds the pictures")
    suffixes = {f".{name}" for name in samples.PICTURES} | set(UNREAD)
    paths = [Path(at) / name for at, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    found = [_source(folder, path.relative_to(folder), None, {}) for path in paths if path.suffix.lower() in suffixes]
    if not found:
        raise UserError(f"{folder} has no pictures ({', '.join(sorted(suffixes))}); check the path")
    return found


def from_table(folder: Path, table: Path, image_column: str, caption_column: str) -> list[Source]:
    """The rows of a table; raises UserError when it cannot be read or lacks a column."""
    found = []
    for where, row in rows(table):
        missing = [column for column in (image_column, caption_column) if column not in row]
        if missing:
            raise UserError(
                f"{where} has no column '{missing[0]}' (it has: {', '.join(map(str, row))}); "
                "name the right ones with --image-column and --caption-column"
            )
        meta = {str(name): value for name, value in row.items() if name not in (image_column, caption_column)}
        found.append(_source(folder, Path(str(row[image_column])), str(row[caption_column] or ""), meta))
    if not found:
        raise UserError(f"{table} has no rows")
    return found


def _source(folder: Path, name: Path, caption: str | None, meta: Mapping[str, Any]) -> Source:
    path = folder / name
    beside = [] if caption is not None else [path.with_suffix(f".{extension}") for extension in BESIDE]
    stamps = tuple(map(_stamp, [path, *beside]))
    shown = name.as_posix().encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
    return Source(shown, str(path), caption, meta, stamps)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Bytes of a file and when it was changed; None where there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


# ---------------------------------------------------------------- shards


def make_shards(sources: Sequence[Source], output: Path, options: Options, workers: int) -> dict[str, Any]:
    """Write the shards that `output` still lacks, and the report, which is returned."""
    plan = _plan(sources, options)
    manifest = _manifest(output, sources, options)
    done: dict[str, Any] = manifest["shards"]
    with (
        tqdm(total=len(sources), unit=" pictures", disable=None) as progress,
        ProcessPoolExecutor(workers, initializer=_start_worker) as pool,
    ):
        for name, numbered in plan.items():
            if name in done and (output / name).exists():
                progress.update(len(numbered))
                continue
            made: list[Made] = []
            try:
                for one in pool.map(partial(_convert, options=options), numbered, chunksize=8):
                    made.append(one)
                    progress.update()
            except BrokenProcessPool as error:
                raise UserError("a worker process died, perhaps for want of memory; try fewer --workers") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            records = [one for one in made if not isinstance(one, str)]
            write_shard(output / name, records)
            bad = [(source.name, one) for (_, source), one in zip(numbered, made, strict=True) if isinstance(one, str)]
            done[name] = {"samples": len(records), "left_out": bad}
            atomic_write_text(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    report = _report(plan, done)
    atomic_write_text(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _plan(sources: Sequence[Source], options: Options) -> dict[str, list[tuple[int, Source]]]:
    """Shard name -> its pictures, numbered through each split."""
    splits: dict[str, list[Source]] = {"train": [], "val": []}
    for source in sorted(sources, key=lambda source: source.digest):
        splits["val" if int(source.digest[:8], 16) < options.holdout * 2**32 else "train"].append(source)
    plan = {}
    for split, members in splits.items():
        numbered = list(enumerate(members))
        for shard, first in enumerate(range(0, len(members), options.per_shard)):
            plan[f"{split}-{shard:05d}.tar"] = numbered[first : first + options.per_shard]
    return plan


def _manifest(output: Path, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """The manifest of an earlier run on the same pictures, or a new one; raises UserError if it is of others."""
    listing = sorted(json.dumps([s.name, s.stamps, s.caption, s.meta], default=str, sort_keys=True) for s in sources)
    pictures = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogatepass")).hexdigest()
    fresh = {"pictures": pictures, "options": asdict(options), "shards": {}}
    path = output / MANIFEST
    if not path.exists():
        return fresh
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not parse ({error}); remove {output} and run again") from error
    if not isinstance(found, dict) or not isinstance(found.get("shards"), dict):
        raise UserError(f"{path} is not what this tool writes; name another folder or remove {output}")
    for what in ("pictures", "options"):
        if found.get(what) != fresh[what]:
            raise UserError(f"{output} holds shards of other {what}; name another folder or remove this one")
    return found


def _report(plan: Mapping[str, Sequence[Any]], done: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: done[name]["samples"] for name in plan}
    left_out: dict[str, list[str]] = {}
    for name in plan:
        for picture, reason in done[name]["left_out"]:
            left_out.setdefault(reason, []).append(picture)
    splits: Counter[str] = Counter()
    for name, count in counts.items():
        splits[name.split("-")[0]] += count
    return {"samples": sum(counts.values()), "splits": splits, "shards": counts, "left_out": left_out}


# ---------------------------------------------------------------- one picture


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; when it dies without a word, so does this process."""

    def outlive_nobody() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=outlive_nobody, daemon=True).start()


def _convert(numbered: tuple[int, Source], options: Options) -> Made:
    """A picture and its caption as a shard's record."""
    number, source = numbered
    try:
        record = _read(source)
        sample = samples.decode(record, "txt", random.Random(0))
    except BadSample as error:
        return str(error)
    extension = options.format
    own = next(name for name in samples.PICTURES if name in record.fields)
    kept = options.size == 0 and own.replace("jpeg", "jpg") == extension
    content = record.fields[own] if kept else _encoded(sample.picture, options)
    meta = json.dumps({**sample.meta, "file": source.name}, default=str)
    fields = {extension: content, "txt": sample.caption.encode(), "json": meta.encode()}
    return f"{number:06d}", fields


def _read(source: Source) -> Record:
    """The files of a picture as a record. Raises BadSample."""
    path = Path(source.path)
    kind = path.suffix.lower().removeprefix(".")
    if source.stamps[0] is None:
        raise BadSample("no such picture")
    if kind not in samples.PICTURES:
        raise BadSample(f"its format is not read; convert it to {', '.join(samples.PICTURES)}")
    try:
        fields = {kind: path.read_bytes()}
        if source.caption is not None:
            fields["txt"] = source.caption.encode("utf-8", "surrogatepass")
            fields["json"] = json.dumps(dict(source.meta), default=str).encode()
        else:
            beside = {extension: path.with_suffix(f".{extension}") for extension in BESIDE}
            fields |= {extension: file.read_bytes() for extension, file in beside.items() if file.is_file()}
    except OSError as error:
        raise BadSample(f"it cannot be read ({error.strerror})") from error
    return Record(source.name, source.path, fields)


def _encoded(picture: Image.Image, options: Options) -> bytes:
    """The picture, its shorter side reduced to options.size where that is smaller, in options.format."""
    scale = options.size / min(picture.size)
    if 0 < scale < 1:
        width, height = (max(options.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if options.format == "png":
        picture.save(out, "PNG")
    else:
        picture.save(out, {"webp": "WEBP", "jpg": "JPEG"}[options.format], quality=options.quality)
    return out.getvalue()


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = Parser(description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--table", type=Path, help="CSV, TSV, JSONL or Parquet file with a row for each picture")
    parser.add_argument("--image-column", default="image", help="column with the picture's path")
    parser.add_argument("--caption-column", default="caption", help="column with the caption")
    parser.add_argument("--size", type=NATURAL, default=0, help="reduce the shorter side to this; 0 keeps")
    parser.add_argument("--format", choices=("webp", "jpg", "png"), default="webp")
    parser.add_argument("--quality", type=Bounded(int, 1, 100), default=90, help="of webp and jpg, 1 to 100")
    parser.add_argument("--per-shard", type=COUNT, default=1000, help="pictures in a shard")
    parser.add_argument("--workers", type=COUNT, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--holdout", type=Bounded(float, 0, 0.99), default=0.0, help="share of pictures for val shards")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
