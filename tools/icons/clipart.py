"""Debian's openclipart-svg -> `Drawing`s: only what its own tag dedicates to the public domain and its title describes.

Titles were typed by hundreds of people, part in Italian and French, part file names. A drawing is kept if each word of
its cleaned title is in the vocabulary of the emoji annotations; that leaves about a third, right in 85 to 90 of 100.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from .captions import words
from .drawings import Drawing, fit

FOLDER = Path("usr/share/openclipart/svg")
_LEFT_OUT = words(  # flags, maps, signs, ornaments, screen themes; people/ holds traced photographs of persons
    """computer decorations geography gradients logos patterns people shapes signs_and_symbols special theme themes
    unsorted"""
)
_LEFT_OUT_TITLES = words("dead mermaid pinup bride model")  # what is drawn there is not what an emoji would show
_LARGEST = 600_000  # bytes; what is larger is a traced photograph
_STOP = words("a an the of on in with and by at to for from")
_GENERIC = words(
    "clipart clip art image picture drawing icon symbol untitled new old simple basic line vector svg open"
)


def read_clipart(key: str, package: Path, vocabulary: frozenset[str]) -> Iterator[Drawing]:
    """The drawings below `package` (the unpacked .deb), in the order of their paths."""
    root = package / FOLDER
    for path in sorted(root.rglob("*.svg")):
        inside = path.relative_to(root)
        if _LEFT_OUT.intersection(inside.parts[:-1]) or path.stat().st_size > _LARGEST:
            continue
        svg = path.read_text(encoding="utf-8", errors="replace")
        name = title(svg, vocabulary)
        if name and is_public_domain(svg) and fit(name):
            identity = re.sub(r"[^\w.-]", "_", "__".join(inside.with_suffix("").parts))
            yield Drawing(key, identity, name, _subjects(svg, name), False, svg=svg, spill=True)


def is_public_domain(svg: str) -> bool:
    """Whether the file's RDF names the public domain as its licence."""
    return bool(re.search(r'<(?:cc:)?license\s[^>]*rdf:resource="[^"]*public_?domain', svg, re.IGNORECASE))


def title(svg: str, vocabulary: frozenset[str]) -> str:
    """The first title of the RDF as a name, '' if there is none or a word is not in the vocabulary."""
    found = re.search(r"<(?:\w+:)?Work\b.*?<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
    text = unescape(found[1]).lower() if found else ""
    text = re.sub(r"\bby\b.*|[_\d.,:;()\[\]!?\"/-]+", " ", text)
    said = text.split()
    meant = [word for word in said if word not in _STOP]
    if not 1 <= len(meant) <= 4 or _GENERIC.issuperset(meant) or _LEFT_OUT_TITLES.intersection(meant):
        return ""
    return " ".join(said) if all(len(word) > 1 and _known(word, vocabulary) for word in meant) else ""


def _known(word: str, vocabulary: frozenset[str]) -> bool:
    return word in vocabulary or word.removesuffix("s") in vocabulary


def _subjects(svg: str, name: str) -> tuple[str, ...]:
    found = re.search(r"<dc:subject>(.*?)</dc:subject>", svg, re.DOTALL)
    listed = re.findall(r"<rdf:li>([^<]+)</rdf:li>", found[1]) if found else []
    subjects = (unescape(subject).strip().lower() for subject in listed)
    return tuple(dict.fromkeys(s for s in subjects if re.fullmatch(r"[a-z][a-z ]+", s) and s != name))
