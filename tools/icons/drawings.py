"""Package -> `Drawing`s: what is in a set, named and filtered, before anything is rendered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

from .captions import Emoji, EmojiNames
from .filters import is_brand, is_object, is_unfit, keep_tone
from .sources import SOURCES


@dataclass(frozen=True)
class Drawing:
    """One picture before it is rendered: SVG text, or the path of a picture file."""

    source: str
    id: str  # unique in its source
    name: str
    keywords: tuple[str, ...]
    object: bool
    svg: str = ""
    file: Path | None = None
    spill: bool = False  # drawn beyond its page: render a larger one and crop to what is drawn
    phrases: tuple[str, ...] = ()  # the captions, for pictures that a name with a style does not describe


def fit(name: str) -> bool:
    """False for brands, for what is not drawn at all and for names without letters."""
    return bool(re.search("[A-Za-z]", name)) and len(name) > 1 and not is_brand(name) and not is_unfit(name)


def read_iconify(key: str, package: Path, chars: Path | None, names: EmojiNames | None) -> Iterator[Drawing]:
    """The drawings of an iconify package (icons.json, and chars.json where it has one), in the order of their names.

    Emoji that Unicode does not name are left out: their names would be guesses.
    """
    source = SOURCES[key]
    whole = _json(package / "icons.json")
    points = {name: code for code, name in _json(chars).items()} if chars is not None else {}
    others: dict[str, list[str]] = {}
    for alias, about in whole.get("aliases", {}).items():
        if set(about) == {"parent"}:  # the same picture under another name, not a mirrored one
            others.setdefault(about["parent"], []).append(alias)
    for identity, icon in sorted(whole["icons"].items()):
        if icon.get("hidden") or not identity.endswith(source.suffix):
            continue
        emoji = None
        if source.kind == "emoji":
            assert names is not None
            emoji = _named(names, identity, points.get(identity), others.get(identity, []))
            if emoji is None or not keep_tone(key, identity, emoji.tones):
                continue
        name = emoji.name if emoji else _spoken(identity.removesuffix(source.suffix))
        if fit(name):
            yield _drawing(key, identity, name, emoji, svg=_svg(whole, icon))


def read_files(key: str, package: Path, names: EmojiNames) -> Iterator[Drawing]:
    """The drawings of a package with one picture for each emoji, assets/<code points>.webp.

    Some of its names have variation selectors, some not, and some pictures are there under both; an id has none.
    """
    seen: set[str] = set()
    for path in sorted((package / "assets").glob("*.webp")):
        emoji = names.by_code_points(path.stem)
        identity = path.stem.replace("-fe0f", "")
        if emoji is None or identity in seen:
            continue
        seen.add(identity)
        if keep_tone(key, identity, emoji.tones) and fit(emoji.name):
            yield _drawing(key, identity, emoji.name, emoji, file=path)


def _drawing(
    key: str, identity: str, name: str, emoji: Emoji | None, svg: str = "", file: Path | None = None
) -> Drawing:
    keywords = tuple(word for word in emoji.keywords if word != name) if emoji else ()
    thing = emoji is not None and is_object(name, emoji.group, emoji.tones)
    return Drawing(key, identity, name, keywords, thing, svg, file)


def _named(names: EmojiNames, identity: str, points: str | None, aliases: list[str]) -> Emoji | None:
    found = names.by_code_points(points) if points else None
    return found or names.by_slug([identity, *aliases]) or names.by_squashed(identity)


def _spoken(identity: str) -> str:
    """'wind-beaufort-2-fill' -> 'wind beaufort': dashes to spaces, without '-fill' and a running number."""
    return re.sub(r"-\d+$", "", identity.removesuffix("-fill")).replace("-", " ")


def _svg(whole: dict[str, Any], icon: dict[str, Any]) -> str:
    """The SVG document of one icon; its box is the icon's own or the set's (16 by iconify's convention)."""
    left, top = icon.get("left", whole.get("left", 0)), icon.get("top", whole.get("top", 0))
    width, height = icon.get("width", whole.get("width", 16)), icon.get("height", whole.get("height", 16))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
    return f"<svg {space} {box}>{icon['body']}</svg>"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder and run again to fetch it anew") from error
