"""The protocol of a result in few lines, to be printed under its figures."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

MARGIN = 13  # of the words, where the names of the protocol's parts stand
WIDTH = 120
LISTED = 4  # longer lists are only counted
HASH = 8  # characters of a hash that are printed; the JSON has it whole


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
