"""Samples -> shards that are whole or absent, the table of sources, and the attributions.

A folder of shards has an index.json: for each shard the hash of what it was made from. A shard whose hash and size are
still right is kept; one that a new plan does not have is removed, so that the folder's tars are the set and no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ldm.data.writing import write_shard
from ldm.errors import UserError
from ldm.files import atomic_write_text, read_text
from ldm.metrics.tables import columns

from .masters import Master, where_from
from .parallel import ordered_map
from .sources import SOURCES

T = TypeVar("T")

SPLITS = ("train", "test_combo", "test_concept")
PER_SHARD = 2048
INDEX = "index.json"


def write_folder(
    folder: Path,
    plans: Mapping[str, Sequence[T]],
    fingerprint: Callable[[T], bytes],
    make: Callable[[T], Mapping[str, bytes] | None],
    processes: int,
) -> dict[str, int]:
    """Write `plans` (split -> items) as <split>-NNNN.tar of up to 2048 samples; returns the samples of each shard.

    Args:
        fingerprint: bytes that change whenever an item's sample would.
        make: item -> members of its sample, None to leave it out; picklable, as is the item.
        processes: 1 makes the samples in this process.
    """
    planned = {
        f"{split}-{number:04d}.tar": items[first : first + PER_SHARD]
        for split, items in plans.items()
        for number, first in enumerate(range(0, len(items), PER_SHARD))
    }
    index = _index(folder)
    hashes = {name: _digest(items, fingerprint) for name, items in planned.items()}
    wanted = [name for name in planned if not _is_done(folder / name, index.get(name), hashes[name])]
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()  # of a build that was killed in the middle of a file
    for name in index.keys() - planned.keys():
        (folder / name).unlink(missing_ok=True)
    index = {name: index[name] for name in planned if name in index and name not in wanted}
    counts = tqdm(total=sum(map(len, planned.values())), unit=" samples", desc=f"writing {folder.name}", disable=None)
    with counts as progress:
        progress.update(sum(len(items) for name, items in planned.items() if name not in wanted))
        work = partial(_make_all, make=make)
        for name, made in zip(wanted, ordered_map(work, (planned[name] for name in wanted), processes), strict=True):
            number = write_shard(folder / name, ((f"{i:06d}", fields) for i, fields in enumerate(made)))
            size = (folder / name).stat().st_size
            index[name] = {"made_from": hashes[name], "bytes": size, "samples": number}
            atomic_write_text(folder / INDEX, json.dumps(dict(sorted(index.items())), indent=1) + "\n")
            progress.update(len(planned[name]))
    atomic_write_text(folder / INDEX, json.dumps(dict(sorted(index.items())), indent=1) + "\n")
    return {name: int(about["samples"]) for name, about in sorted(index.items())}


def _make_all(items: Sequence[T], make: Callable[[T], Mapping[str, bytes] | None]) -> list[Mapping[str, bytes]]:
    return [fields for fields in map(make, items) if fields is not None]


def _digest(items: Iterable[T], fingerprint: Callable[[T], bytes]) -> str:
    digest = hashlib.sha256()
    for item in items:
        part = fingerprint(item)
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _is_done(path: Path, entry: Mapping[str, Any] | None, made_from: str) -> bool:
    if entry is None or entry.get("made_from") != made_from or not path.is_file():
        return False
    return path.stat().st_size == entry.get("bytes")


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        return dict(json.loads(read_text(path)))
    except ValueError as error:
        raise UserError(f"{path} does not parse ({error}); remove {folder} and run again") from error


# ---------------------------------------------------------------- reports


def table(masters: Sequence[Master], found: Mapping[str, int], lost: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown: each source with package, licence and counts.

    `found`: source -> drawings that passed the filters of names; `lost`: source -> reason -> how many went after that.
    """
    kept = where_from(masters)
    rows = [["source", "package", "licence", "found", "not drawn", "alike", "kept", *SPLITS]]
    for key, splits in kept.items():
        source = SOURCES.get(key)
        package = f"{source.package} {source.version}" if source else ""
        licence = source.licence if source else next(one.licence for one in masters if one.source == key)
        gone = lost.get(key, {})
        numbers = [found.get(key, sum(splits.values())), gone.get("not drawn", 0), gone.get("alike", 0)]
        numbers += [sum(splits.values()), *(splits.get(split, 0) for split in SPLITS)]
        rows.append([key, package, licence, *(f"{number:,}" for number in numbers)])
    totals = [sum(int(row[i].replace(",", "")) for row in rows[1:]) for i in range(3, len(rows[0]))]
    rows.append(["all", "", "", *(f"{number:,}" for number in totals)])
    rows.insert(1, ["---", "---", "---", *("---:" for _ in totals)])
    return "".join(f"| {line} |\n" for line in columns(rows, left=3, between=" | "))


_LICENCES = {
    "MIT": "https://opensource.org/license/mit",
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}


def attribution(masters: Sequence[Master]) -> str:
    """Markdown: title, author, licence with link, and what was changed, for each source in the set."""
    text = (
        "# Attribution\n\nThe pictures of this set were drawn by the people below. They were changed: rendered to "
        "pixels, scaled, and in part recoloured, put on coloured backgrounds and combined in pairs. Names and keywords "
        "of emoji are Unicode's (CLDR, Unicode-3.0, https://www.unicode.org/license.txt).\n\n"
    )
    for key, splits in where_from(masters).items():
        one = next(one for one in masters if one.source == key)
        source = SOURCES.get(key)
        origin = f", {source.link} (package {source.package} {source.version})" if source else ""
        licence = f"[{one.licence}]({_LICENCES[one.licence]})" if one.licence in _LICENCES else one.licence
        text += f"- **{key}** ({sum(splits.values()):,} pictures), by {one.author}{origin}: {licence}\n"
    return text
