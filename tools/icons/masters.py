"""Masters: rendered sprites with transparency and all that is known of each; and the dense pack they may travel in.

A dense pack is masters-NN.bin, WebP files end to end, beside masters-NN.jsonl with one line for each: `offset` and
`length` in the .bin, and the fields of `Master`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.errors import UserError, explain_os_error

from .captions import captions, shown_keywords, with_article
from .drawings import Drawing
from .filters import is_sensitive, split
from .sources import SOURCES


@dataclass(frozen=True)
class Master:
    """One sprite. `captions[0]` is the main caption; `webp` the RGBA picture, square."""

    source: str
    id: str
    name: str
    style: str
    licence: str
    author: str
    split: str
    captions: tuple[str, ...]
    keywords: tuple[str, ...]
    mono: bool
    object: bool
    sensitive: bool
    webp: bytes

    def meta(self) -> dict[str, Any]:
        """Everything but the picture, as the sample's json keeps it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "webp"}


def master(drawing: Drawing, webp: bytes) -> Master:
    """A rendered drawing with its captions, licence and split."""
    source = SOURCES[drawing.source]
    phrase = drawing.name if source.kind == "icon" else with_article(drawing.name)  # icons' names are not all nouns
    said = drawing.phrases or captions(drawing.name, phrase, source.style, drawing.keywords)
    return Master(
        source=drawing.source,
        id=drawing.id,
        name=drawing.name,
        style=source.style,
        licence=source.licence,
        author=source.author,
        split=split(drawing.name, source.family),
        captions=tuple(said),
        keywords=tuple(shown_keywords(drawing.keywords)),
        mono=source.mono,
        object=drawing.object,
        sensitive=is_sensitive(drawing.name),
        webp=webp,
    )


def read_pack(folder: Path) -> Iterator[Master]:
    """The sprites of a dense pack, in its order. Raises UserError if it is not one or is torn."""
    listings = sorted(folder.glob("masters-*.jsonl"))
    if not listings:
        raise UserError(f"{folder} holds no masters-NN.jsonl; name the folder of a dense pack")
    for listing in listings:
        try:
            content = listing.with_suffix(".bin").read_bytes()
            lines = listing.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise explain_os_error(error, f"reading {listing} and its .bin") from error
        for number, line in enumerate(lines, 1):
            yield _parse(line, content, f"{listing}:{number}")


def _parse(line: str, content: bytes, where: str) -> Master:
    try:
        about: Mapping[str, Any] = json.loads(line)
        first, length = int(about["offset"]), int(about["length"])
        known = {field.name: about[field.name] for field in fields(Master) if field.name != "webp"}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a line of a dense pack ({error!r}); download the pack again") from error
    webp = content[first : first + length]
    if len(webp) != length or webp[:4] != b"RIFF":
        raise UserError(f"{where} names bytes that its .bin does not have; download the pack again")
    known |= {name: tuple(known[name]) for name in ("captions", "keywords")}
    return Master(**known, webp=webp)


def where_from(masters: Iterable[Master]) -> dict[str, dict[str, int]]:
    """Source -> split -> how many, sources in the table's order."""
    counts: dict[str, dict[str, int]] = {}
    for one in masters:
        splits = counts.setdefault(one.source, {})
        splits[one.split] = splits.get(one.split, 0) + 1
    order = {key: number for number, key in enumerate(SOURCES)}
    return dict(sorted(counts.items(), key=lambda item: order.get(item[0], len(order))))
