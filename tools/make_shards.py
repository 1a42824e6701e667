"""Turn a folder of captioned pictures into shards for training.

    python tools/make_shards.py PICTURES --output DIR
    python tools/make_shards.py PICTURES --output DIR --table captions.csv --caption-column text

Without a table, the caption of `a/b.jpg` is `a/b.txt` or `a/b.caption` (UTF-8), or the `caption` of `a/b.json`, whose
other fields come along, or a list of captions there. With a table (CSV, TSV, JSON, JSONL, Parquet), each row names a
picture, relative to PICTURES, and its caption; the other columns come along as json. DIR gets `train-00000.tar`, ...
and, with --holdout, `val-00000.tar`, ... of that share of the pictures, one at least.

Pictures are sorted by the md5 of their path: shards are mixed, the same on each run, and a picture stays on its side of
the hold-out when others come or go. What cannot be used is left out and listed in DIR/report.json; of an animation the
first picture is used; hidden files and folders are not read. A run that was interrupted goes on behind its last whole
shard when it is called again; pictures or captions that were changed meanwhile want a folder of their own.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import hashlib
import io
import json
import os
import random
import stat
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm import pictures
from ldm.arguments import COUNT, NATURAL, Bounded, Parser
from ldm.data import samples
from ldm.data.folders import UNREAD, Picture, caption_fields, captioned, find_pictures, read_file
from ldm.data.records import BadSample, Record, shown
from ldm.data.tables import column_of, rows
from ldm.data.writing import write_shard
from ldm.errors import UserError, kind_and_line
from ldm.files import atomic_write_text, read_text
from ldm.locks import held
from ldm.workers import pool

MANIFEST, REPORT = "shards.json", "report.json"
FORMATS = {"webp": ("WEBP", 16_383), "jpg": ("JPEG", 65_500), "png": ("PNG", 2**31 - 1)}  # Pillow's name, longest side


@dataclass(frozen=True)
class Source:
    """A picture before it is read: `name` is its path below the folder, `caption` and `meta` are the table's."""

    name: str
    picture: Picture
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


LeftOut = tuple[str, str]  # a name below the folder, and why it is not used
Made = tuple[str, dict[str, bytes]] | str  # a record, or the reason why there is none


def main() -> None:
    args = _arguments()
    options = Options(args.size, args.format, args.quality, args.per_shard, args.holdout)
    if args.table:
        sources, left_out = from_table(args.pictures, args.table, args.image_column, args.caption_column), []
    else:
        sources, left_out = from_folder(args.pictures)
    with held(args.output):
        report = make_shards(sources, left_out, args.output, options, args.workers)
    print(f"{report['samples']} samples in {len(report['shards'])} shards in {args.output}")
    for reason, names in report["left_out"].items():
        print(f"left out {len(names)}: {reason} ({', '.join(map(shown, names[:3]))}{', ...' * (len(names) > 3)})")
    if report["left_out"]:
        print(f"all of them are listed in {args.output / REPORT}")
    if not report["samples"]:
        raise UserError("none of the pictures can be used; the reasons are above")


# ---------------------------------------------------------------- what there is


def from_folder(folder: Path) -> tuple[list[Source], list[LeftOut]]:
    """All pictures below `folder`, and what is not read of it; raises UserError if there are no pictures."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the one that holds the pictures")
    kinds = (*samples.PICTURES, *UNREAD)
    found = find_pictures(folder, kinds)
    left_out = [(_shown(path.relative_to(folder)), reason) for path, reason in found.left_out]
    named: dict[Path, list[Picture]] = defaultdict(list)
    for picture in found.pictures:
        named[picture.path.with_suffix("") if picture.kind in samples.PICTURES else picture.path].append(picture)
    sources = []
    for alike in named.values():  # as training does of a sample with two pictures, the best format is taken
        first, *others = sorted(alike, key=lambda one: ((_stamp(one.path) or (0,))[0] == 0, kinds.index(one.kind)))
        sources.append(_source(first.path.relative_to(folder), first, None, {}))
        left_out += [(_shown(one.path.relative_to(folder)), "another picture has its name") for one in others]
    if not sources:
        also = "".join(f"; {name} was not read: {reason}" for name, reason in left_out[:1])
        raise UserError(f"{folder} has no pictures (.{', .'.join(sorted(kinds))}); check the path{also}")
    return sources, left_out


def from_table(folder: Path, table: Path, image_column: str, caption_column: str) -> list[Source]:
    """The rows of a table; raises UserError when it cannot be read or lacks a column."""
    found = []
    for where, row in rows(table):
        image, caption = column_of(row, image_column), column_of(row, caption_column)
        if not image or not caption:
            raise UserError(
                f"{where} has no column '{caption_column if image else image_column}' "
                f"(it has: {', '.join(map(str, row))}); name the right ones with --image-column and --caption-column"
            )
        meta = {str(name): value for name, value in row.items() if name not in (image, caption)}
        said, name = row[caption], Path(str(row[image] or ""))
        listed = isinstance(said, list | dict)
        meta |= captioned(said) if listed else {}
        found.append(_source(name, Picture(folder / name), None if listed else str(said or ""), meta))
    if not found:
        raise UserError(f"{table} has no rows")
    return found


def _source(name: Path, picture: Picture, caption: str | None, meta: Mapping[str, Any]) -> Source:
    beside = [] if caption is not None else [picture.beside.get("txt"), picture.beside.get("json")]
    beside += [picture.beside["caption"]] if "caption" in picture.beside else []
    return Source(
        _shown(name), picture, caption, meta, tuple(path and _stamp(path) for path in (picture.path, *beside))
    )


def _shown(name: Path) -> str:
    return name.as_posix().encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8


def _stamp(path: Path) -> tuple[int, int] | None:
    """Bytes of a file and when it was changed; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: no file can have this name
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


# ---------------------------------------------------------------- shards


def make_shards(
    sources: Sequence[Source], left_out: Sequence[LeftOut], output: Path, options: Options, workers: int
) -> dict[str, Any]:
    """Write the shards that `output` still lacks, and the report, which is returned."""
    plan = _plan(sources, options)
    manifest = _manifest(output, sources, options)
    done: dict[str, Any] = manifest["shards"]
    with (
        tqdm(total=len(sources), unit=" pictures", disable=None) as progress,
        pool(workers) as readers,
    ):
        for name, numbered in plan.items():
            if name in done and (output / name).exists():
                progress.update(len(numbered))
                continue
            made: list[Made] = []
            for one in readers.map(partial(_convert, options=options), numbered, chunksize=8):
                made.append(one)
                progress.update()
            records = [one for one in made if not isinstance(one, str)]
            write_shard(output / name, records)
            bad = [(source.name, one) for (_, source), one in zip(numbered, made, strict=True) if isinstance(one, str)]
            done[name] = {"samples": len(records), "left_out": bad}
            atomic_write_text(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    report = _report(plan, done, left_out)
    atomic_write_text(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _plan(sources: Sequence[Source], options: Options) -> dict[str, list[tuple[int, Source]]]:
    """Shard name -> its pictures, numbered through each split."""
    splits: dict[str, list[Source]] = {"train": [], "val": []}
    for source in sorted(sources, key=lambda source: source.digest):
        splits["val" if int(source.digest[:8], 16) < options.holdout * 2**32 else "train"].append(source)
    if options.holdout and not splits["val"] and len(splits["train"]) > 1:
        splits["val"].append(splits["train"].pop(0))  # of few pictures too there is one, for a training to read
    plan = {}
    for split, members in splits.items():
        numbered = list(enumerate(members))
        for shard, first in enumerate(range(0, len(members), options.per_shard)):
            plan[f"{split}-{shard:05d}.tar"] = numbered[first : first + options.per_shard]
    return plan


def _manifest(output: Path, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """The manifest of an earlier run on the same pictures, or a new one; raises UserError if it is of others."""
    listing = sorted(json.dumps([s.name, s.stamps, s.caption, s.meta], default=str, sort_keys=True) for s in sources)
    content = hashlib.sha256("\n".join(listing).encode("utf-8", "surrogatepass")).hexdigest()
    fresh = {"pictures": content, "options": asdict(options), "shards": {}}
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


def _report(plan: Mapping[str, Any], done: Mapping[str, Any], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    counts = {name: done[name]["samples"] for name in plan}
    reasons: dict[str, list[str]] = {}
    for picture, reason in [*(each for name in plan for each in done[name]["left_out"]), *left_out]:
        reasons.setdefault(reason, []).append(picture)
    splits = Counter(name.split("-")[0] for name in plan for _ in range(counts[name]))
    return {"samples": sum(counts.values()), "splits": splits, "shards": counts, "left_out": reasons}


# ---------------------------------------------------------------- one picture


def _convert(numbered: tuple[int, Source], options: Options) -> Made:
    """A picture and its caption as a shard's record."""
    number, source = numbered
    try:
        record = _read(source)
        sample = samples.decode(record, "txt", random.Random(0))
        content = record.fields[source.picture.kind]
        if options.size or _still(content) != options.format:
            content = _encoded(sample.picture, options)
    except BadSample as error:
        return str(error)
    except Exception as error:  # a library's, on a file that nobody foresaw: it must not end the work on all others
        return f"it cannot be converted ({kind_and_line(error)})"
    meta = json.dumps({**sample.meta, "file": source.name}, default=str)
    fields = {options.format: content, "txt": sample.caption.encode(), "json": meta.encode()}
    return f"{number:06d}", fields


def _read(source: Source) -> Record:
    """The files of a picture as a record. Raises BadSample."""
    path, kind = source.picture.path, source.picture.kind
    if not os.path.lexists(path):
        raise BadSample("no such picture")
    if kind not in samples.PICTURES:
        raise BadSample(f"its format is not read; convert it to {', '.join(samples.PICTURES)}")
    fields = {kind: read_file(path)}
    if not fields[kind]:
        raise BadSample("it is an empty file")
    fields |= caption_fields(source.picture.beside)
    if source.caption is not None:
        fields["txt"] = source.caption.encode("utf-8", "surrogatepass")
    if source.meta:
        fields["json"] = json.dumps(dict(source.meta), default=str).encode()
    return Record(source.name, str(path), fields)


def _still(content: bytes) -> str:
    """The format of a picture, as --format spells it; "" for an animation (a JPEG may well have another behind it)."""
    picture = pictures.opened(content, lambda picture: None)
    kind = {"WEBP": "webp", "PNG": "png"}.get(picture.format or "", "jpg")
    return "" if kind != "jpg" and getattr(picture, "is_animated", False) else kind


def _encoded(picture: Image.Image, options: Options) -> bytes:
    """The picture, its shorter side reduced to options.size where that is smaller, in options.format."""
    scale = options.size / min(picture.size)
    if 0 < scale < 1:
        width, height = (max(options.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out, (name, longest) = io.BytesIO(), FORMATS[options.format]
    if max(picture.size) > longest:
        raise BadSample(f"it is over {longest} pixels long, more than {options.format} holds; try --size or png")
    picture.save(out, name, quality=options.quality)  # of which a PNG has none
    return out.getvalue()


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--table", type=Path, help="CSV, TSV, JSON, JSONL or Parquet file, a row for each picture")
    parser.add_argument("--image-column", default="image", help="column with the picture's path")
    parser.add_argument("--caption-column", default="caption", help="column with the caption")
    parser.add_argument("--size", type=NATURAL, default=0, help="reduce the shorter side to this; 0 keeps")
    parser.add_argument("--format", choices=FORMATS, default="webp")
    parser.add_argument("--quality", type=Bounded(int, 1, 100), default=90, help="of webp and jpg, 1 to 100")
    parser.add_argument("--per-shard", type=COUNT, default=1000, help="pictures in a shard")
    parser.add_argument("--workers", type=COUNT, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--holdout", type=Bounded(float, 0, 0.99), default=0.0, help="share of pictures for val shards")
    args = parser.parse_args()
    if not args.table and (args.image_column, args.caption_column) != ("image", "caption"):
        raise UserError("--image-column and --caption-column need --table")
    return args


if __name__ == "__main__":
    run(main)
