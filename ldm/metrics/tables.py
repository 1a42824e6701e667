"""Results as lines to be read: figures in columns, a sweep's rows, and under them how it was measured."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

MARGIN = 13  # of the words, where the names of the protocol's parts stand
WIDTH = 120
LISTED = 4  # longer lists are only counted
HASH = 8  # characters of a hash that are printed; the JSON has it whole
CELL = 18  # letters of a figure's column, at least


def space_of(name: str) -> str:
    """The space in a figure's name, "" where it has none."""
    return name.partition("[")[2].partition("]")[0]


def columns(rows: Sequence[Sequence[str]], least: Sequence[int] = (), left: int = 1, between: str = "  ") -> list[str]:
    """A line for each row, each column as wide as it must be, the first `left` ones set to the left.

    `least`: of the columns' widths, as far as it says.
    """
    widths = [max(map(len, words)) for words in zip(*rows, strict=True)]
    widths = [max(pair) for pair in zip_longest(widths, least[: len(widths)], fillvalue=0)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return [between.join(side(word, n) for side, word, n in zip(sides, row, widths, strict=True)) for row in rows]


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines, those of each space under its name; never two spaces in one column."""
    return tables([figures])


def tables(rows: Sequence[Mapping[str, Any]], heads: Sequence[str] = ()) -> str:
    """The same of several sets of the same figures, a column for each, headed by `heads`."""
    names = [name for name in rows[0] if not name.endswith(" deviation")]
    least = [max(map(len, names), default=0), *[CELL] * len(rows)]
    blocks = []
    for space in dict.fromkeys(map(space_of, names)):
        own = [[name, *(told_of(row, name) for row in rows)] for name in names if space_of(name) == space]
        blocks.append([space or "without a space", *columns([["", *heads], *own] if heads else own, least)])
    return "\n\n".join("\n".join(block) for block in blocks)


def sweep_table(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> str:
    """Lines to be read: for each space a line for each row, with what is varied, its cost, and the space's figures."""
    names = [name for name in rows[0] if space_of(name) and not name.endswith(" deviation")]
    blocks = []
    for space in dict.fromkeys(map(space_of, names)):
        own = [name for name in names if space_of(name) == space]
        heads = [*varied, "pictures", "evaluations", *(name.replace(f"[{space}]", "").strip() for name in own)]
        lines = [heads]
        for row in rows:
            told = [short(row[name]) for name in varied]
            lines.append(
                [*told, str(row["pictures"]), f"{row['evaluations']:g}", *(told_of(row, name) for name in own)]
            )
        blocks.append([space, *columns(lines, left=0)])
    return "\n\n".join("\n".join(block) for block in blocks)


def told_of(figures: Mapping[str, Any], name: str) -> str:
    """A figure as it is printed: "0.10143 +- 0.0037"; "-" where there is none."""
    value, deviation = figures.get(name), figures.get(f"{name} deviation")
    if value is None:
        return "-"
    return f"{value:.5g}" + (f" +- {deviation:.2g}" if deviation is not None else "")


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def brief(document: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """What the figures depend on, a line or more for each part of the protocol, in the words of the JSON.

    `without`: settings of the drawing that are left out, as a sweep's, whose table has them.
    """
    made, sources = dict(document["protocol"]), document.get("sources", {})
    if made.get("drawing"):
        made["drawing"] = {name: value for name, value in made["drawing"].items() if name not in without}
    if made.get("seeds"):  # the first and the last
        made["seeds"] = " to ".join(map(str, made["seeds"]))
    subject = {name: value for name, value in document["subject"].items() if name != "notices"}
    lines = ["", "measured so:"]
    for name, value in {"subject": subject, **made, "sources": sources}.items():
        words = _words(value)
        if words:
            start = f"  {name.replace('_', ' '):{MARGIN - 3}} "
            lines += textwrap.wrap(words, WIDTH, initial_indent=start, subsequent_indent=" " * MARGIN,
                                   break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return "\n".join(lines)


def _words(value: Any) -> str:
    """ "" for what says nothing: None, empty strings, lists and mappings."""
    if isinstance(value, Mapping):
        told = ((key.replace("_", " "), _words(item)) for key, item in value.items())
        return ", ".join(f"{key} {words}" for key, words in told if words)
    if isinstance(value, list | tuple):
        if len(value) > LISTED:
            return f"{len(value)} of them"
        return ("; " if any(isinstance(item, Mapping) for item in value) else ", ").join(map(_words, value))
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text[:HASH] if re.fullmatch("[0-9a-f]{64}", text) else text
