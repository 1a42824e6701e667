"""List the names that several styles have in common, to choose from when a small model is to know a few things well.

    python tools/icons/concepts.py data/icons/masters --styles "noto emoji,flat emoji"
    python tools/icons/concepts.py PACK --styles "noto emoji,flat emoji" --held-out

The first prints, as a YAML list, each name that every style has in its training split, without silhouettes, sensitive
things and skin tones. With --held-out: the names whose picture in exactly one of the styles is held out
(test_combo) while the others are trained, and that style as a comment.
"""

from __future__ import annotations

from ldm.script import run

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.arguments import Parser
from ldm.data.shards import ShardReader, expand, index_shard
from ldm.errors import UserError


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="masters/ of tools/build_icons.py, or a dense pack")
    parser.add_argument("--styles", required=True, help="styles, separated by commas")
    parser.add_argument("--held-out", action="store_true", help="what one style holds out and the others train")
    args = parser.parse_args()
    styles = [style.strip() for style in args.styles.split(",") if style.strip()]
    table = splits(read(args.folder))
    known = {style for row in table.values() for style in row}
    for style in styles:
        if style not in known:
            raise UserError(f"{args.folder} has no style '{style}'; it has {', '.join(sorted(known))}")
    if args.held_out:
        for name, style in half_held_out(table, styles):
            print(f"- {name}  # {style}")
    else:
        for name in shared(table, styles):
            print(f"- {name}")


Table = dict[str, dict[str, set[str]]]  # name -> style -> splits


def read(folder: Path) -> Iterator[Mapping[str, Any]]:
    """What is known of each sprite: the json of shards, or the lines of a dense pack."""
    listings = sorted(folder.glob("masters-*.jsonl"))
    for listing in listings:
        yield from map(json.loads, listing.read_text(encoding="utf-8").splitlines())
    if not listings:
        shards = [index_shard(path) for path in expand(str(folder / "*.tar"), "the folder")]
        reader = ShardReader(shards)
        for number, shard in enumerate(shards):
            for sample in range(len(shard)):
                yield json.loads(reader.member(number, sample, "json") or b"{}")
        reader.close()


def splits(records: Iterable[Mapping[str, Any]]) -> Table:
    """Which splits each name's pictures are in, by style; silhouettes, sensitive things and skin tones left out."""
    table: Table = {}
    for about in records:
        name = about.get("name", "")
        if name and not about.get("mono") and not about.get("sensitive") and "skin tone" not in name:
            table.setdefault(name, {}).setdefault(about["style"], set()).add(about["split"])
    return table


def shared(table: Table, styles: Sequence[str]) -> list[str]:
    """Names that every style trains, sorted."""
    return sorted(name for name, row in table.items() if all(row.get(style) == {"train"} for style in styles))


def half_held_out(table: Table, styles: Sequence[str]) -> list[tuple[str, str]]:
    """(name, style) where that style alone holds the name out and the others train it, sorted."""
    found = []
    for name, row in table.items():
        held = [style for style in styles if row.get(style) == {"test_combo"}]
        if len(held) == 1 and all(row.get(style) == {"train"} for style in styles if style not in held):
            found.append((name, held[0]))
    return sorted(found)


if __name__ == "__main__":
    run(main)
