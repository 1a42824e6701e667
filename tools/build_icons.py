"""Build the captioned picture set: openly licensed emoji, icons, clip art and avatars -> shards.

    python tools/build_icons.py --output data/icons                      # everything in tiers 1 and 2
    python tools/build_icons.py --output data/icons --sources noto,fluent-flat
    python tools/build_icons.py --output data/icons --from-masters PACK  # a dense pack, nothing downloaded

Packages come through `npm pack`, Debian's `apt-get download` (clip art) and Node.js (avatars); the latter two drop out
with a message where their tools are missing. SVGs are rendered once; OUTPUT then has

    masters/   RGBA sprites, lossless: .webp, .txt, .json (source, author, licence, captions, keywords, split, ...)
    shards/    RGB pictures to train on: plain on white, on coloured backgrounds, in pairs, tinted silhouettes
    SOURCES.md, ATTRIBUTION.md, held_out_prompts.txt

as train-, test_combo- and test_concept-NNNN.tar. The same packages give the same bytes. A build that was interrupted
goes on where it was when it is called again: downloads and rendered drawings are kept in --work, finished shards in
OUTPUT.
"""

from __future__ import annotations

from ldm.script import run

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from icons import bake, filters, write
from icons.avatars import CORE, read_avatars
from icons.captions import EmojiNames
from icons.clipart import read_clipart
from icons.drawings import Drawing, read_files, read_iconify
from icons.fetch import Fetch, Packages, Unavailable, debian_package, npm_package
from icons.masters import Master, master, read_pack
from icons.rasterise import render_all, thumbnail
from icons.sources import NAMES, SOURCES

from ldm.arguments import COUNT, Parser
from ldm.errors import UserError, instead
from ldm.files import atomic_write_text
from ldm.locks import held

HELD_OUT_PROMPTS = 1000


def main() -> None:
    args = _arguments()
    packages = Packages(args.work)
    found: dict[str, int] = {}
    lost: dict[str, dict[str, int]] = {}
    if args.from_masters:
        masters = [one for one in read_pack(args.from_masters) if _wanted(one.source, args)]
    else:
        drawings = collect(args, packages)
        for drawing in drawings:
            found[drawing.source] = found.get(drawing.source, 0) + 1
        masters = draw(drawings, args, lost)
    if not masters and packages.missing:
        raise UserError(f"nothing can be built, these packages were not available: {packages.reasons()}")
    if not masters:
        raise UserError("none of the pictures can be used; check --sources and --tier")
    with held(args.output):
        write_set(masters, args)
    report = write.table(masters, found, lost)
    atomic_write_text(args.output / "SOURCES.md", report)
    print(report, end="")
    absent = [key for key in SOURCES if _wanted(key, args) and SOURCES[key].package in packages.missing]
    if any(args.sources or not SOURCES[key].optional for key in absent):
        raise UserError(
            f"the set lacks {', '.join(absent)}, since these packages were not available: {packages.reasons()}; "
            "solve that and run again; what is finished is kept"
        )
    if absent:
        print(f"without {', '.join(absent)}: {packages.reasons()}", file=sys.stderr)


# ---------------------------------------------------------------- the stages


def collect(args: argparse.Namespace, packages: Packages) -> list[Drawing]:
    """The drawings of all wanted sources that are available, in the order of SOURCES."""
    keys = [key for key in SOURCES if _wanted(key, args)]
    names = _names(packages) if any(_is_named(key) for key in keys) else None
    drawings: list[Drawing] = []
    for key in keys:
        try:
            drawings += _of_source(key, names, packages, args)[: args.limit]
        except Unavailable as error:
            packages.missing.setdefault(SOURCES[key].package, str(error))
    return drawings


def _names(packages: Packages) -> EmojiNames | None:
    folders = [packages.get(npm_package, *package) for package in NAMES]
    have = [folder for folder in folders if folder is not None]
    return EmojiNames.read(*have) if len(have) == len(NAMES) else None


def _of_source(key: str, names: EmojiNames | None, packages: Packages, args: argparse.Namespace) -> list[Drawing]:
    """The drawings of one source. Raises Unavailable if it, or what it needs, is not available."""
    source = SOURCES[key]
    fetch = debian_package if source.kind == "clipart" else npm_package
    package = _get(packages, fetch, source.package, source.version)
    if source.kind == "icon":
        return list(read_iconify(key, package, None, None))
    if source.kind == "avatar":
        return list(read_avatars(key, [_get(packages, npm_package, *CORE), package], source.style))
    if names is None:
        raise Unavailable("its pictures' names were not available")
    if source.kind == "clipart":
        return list(read_clipart(key, package, names.vocabulary))
    if source.kind == "files":
        return list(read_files(key, package, names))
    speller = SOURCES[source.spelled_by or key]
    chars = _get(packages, npm_package, speller.package, speller.version) / "chars.json"
    return list(read_iconify(key, package, chars if chars.exists() else None, names))


def _get(packages: Packages, fetch: Fetch, name: str, version: str) -> Path:
    folder = packages.get(fetch, name, version)
    if folder is None:
        raise Unavailable(f"{name} was not available")
    return folder


def draw(drawings: Sequence[Drawing], args: argparse.Namespace, lost: dict[str, dict[str, int]]) -> list[Master]:
    """Rendered, without near-duplicates: of two alike the lower tier's stays, then the earlier source's."""
    rendered = render_all(drawings, args.size, args.work, args.processes)
    masters: list[Master] = []
    for drawing, webp in zip(drawings, rendered, strict=True):
        if webp is None:
            _count(lost, drawing.source, "not drawn")
        else:
            masters.append(master(drawing, webp))
    masters.sort(key=lambda one: SOURCES[one.source].tier)  # stable: the order of sources and names stays within a tier
    if not masters:
        return []
    alike = set(filters.near_duplicates(np.stack([thumbnail(one.webp, filters.THUMBNAIL) for one in masters])))
    for index in alike:
        _count(lost, masters[index].source, "alike")
    return [one for index, one in enumerate(masters) if index not in alike]


def write_set(masters: Sequence[Master], args: argparse.Namespace) -> None:
    """Both folders of shards, the attributions and the prompts that no training sample has."""
    ordered = sorted(masters, key=lambda one: hashlib.md5(f"{one.source}/{one.id}".encode()).digest())
    splits = {split: [one for one in ordered if one.split == split] for split in write.SPLITS}
    write.write_folder(args.output / "masters", splits, _of_master, bake.master_sample, 1)
    plans = {split: bake.plan(members, args.draws) for split, members in splits.items()}
    write.write_folder(args.output / "shards", plans, _of_job, bake.bake, args.processes)
    atomic_write_text(args.output / "ATTRIBUTION.md", write.attribution(masters))
    prompts = bake.held_out_prompts(masters, HELD_OUT_PROMPTS)
    atomic_write_text(args.output / "held_out_prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))


_RECIPE = "2"  # to be raised when the drawing of baked samples changes, so that shards made before are made anew


def _of_master(one: Master) -> bytes:
    return json.dumps(one.meta(), sort_keys=True).encode() + hashlib.sha256(one.webp).digest()


def _of_job(job: bake.Job) -> bytes:
    partner = _of_master(job.partner) if job.partner else b""
    return f"{_RECIPE} {job.seed} ".encode() + _of_master(job.master) + partner


# ---------------------------------------------------------------- what is wanted, what is available


def _is_named(key: str) -> bool:
    """Whether a source takes names or its vocabulary from Unicode's annotations."""
    return SOURCES[key].kind in ("emoji", "files", "clipart")


def _wanted(key: str, args: argparse.Namespace) -> bool:
    if args.sources:
        return key in args.sources
    return key not in SOURCES or SOURCES[key].tier <= args.tier


def _count(lost: dict[str, dict[str, int]], source: str, reason: str) -> None:
    lost.setdefault(source, {})[reason] = lost.get(source, {}).get(reason, 0) + 1


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the set")
    parser.add_argument("--work", type=Path, default=Path("data/icons-work"), help="cache of downloads and renders")
    parser.add_argument(
        "--from-masters", type=Path, metavar="PACK", help="folder of a dense pack to build from instead"
    )
    parser.add_argument(
        "--tier",
        type=int,
        choices=(1, 2, 3),
        default=2,
        help="licences: 1 MIT, Apache-2.0, public domain; 2 and CC-BY; 3 and CC-BY-SA",
    )
    parser.add_argument("--sources", help=f"only these, separated by commas: {', '.join(SOURCES)}")
    parser.add_argument("--size", type=COUNT, default=128, help="pixels on a side; a pack keeps its own")
    parser.add_argument("--draws", type=COUNT, default=1, help="times each background, pair and tint is drawn")
    parser.add_argument("--limit", type=COUNT, help="at most so many drawings of each source: to try a build quickly")
    parser.add_argument("--processes", type=COUNT, default=os.cpu_count() or 1)
    args = parser.parse_args()
    args.sources = [key for key in args.sources.split(",") if key] if args.sources else None
    unknown = [key for key in args.sources or () if key not in SOURCES]
    if unknown:
        raise UserError(f"no source is called '{unknown[0]}'{instead(unknown[0], SOURCES)}; --help lists them")
    too_free = [key for key in args.sources or () if SOURCES[key].tier > args.tier]
    if too_free:
        raise UserError(
            f"{too_free[0]} is of tier {SOURCES[too_free[0]].tier}; say --tier {SOURCES[too_free[0]].tier} as well"
        )
    return args


if __name__ == "__main__":
    run(main)
