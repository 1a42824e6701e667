"""JSON and YAML from strangers: plain data in bounded memory and time; no tag makes an object, no alias a bomb."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError, first_line
from ldm.files import read_text

MAX_TEXT = 16 << 20  # bytes of a JSON file; a model's with a table of all its tokens has half a million
MAX_YAML = 1 << 20  # bytes of a YAML file, whose parser is slow
MAX_DEPTH = 32  # collections within collections


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises UserError for anything else."""
    return parse_json(_bounded_text(path, MAX_TEXT), path)


def parse_json(text: str, where: str | Path) -> dict[str, Any]:
    """The object that `text` (from `where`) holds; raises UserError for anything else, and for a key set twice."""
    if len(text) > MAX_TEXT:
        raise UserError(f"{where} holds {len(text):,} letters of settings, which no model needs; it was not read")
    try:
        plain = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} does not hold valid JSON ({first_line(error)}); copy it again") from error
    if not isinstance(plain, dict):
        raise UserError(f"{where} holds a {type(plain).__name__} where a JSON object of settings should be")
    waiting: list[tuple[Any, int]] = [(plain, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{where} nests its settings more than {MAX_DEPTH} deep, which none are")
        inner = value.values() if isinstance(value, dict) else value
        waiting.extend((item, depth + 1) for item in inner if isinstance(item, dict | list))
    return plain


def leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}, "c": [2]} -> ("a.b", 1), ("c", [2])"""
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml_text(path: str | Path) -> str:
    """The text of a YAML file after a look at its structure: UserError for aliases (a few lines of them can stand for
    billions of values), for collections nested too deeply, for a file too long, and for what is no YAML.
    """
    import yaml

    text = _bounded_text(path, MAX_YAML)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(
                    f"{path} uses a YAML alias (*{event.anchor[:60]}), which settings may not; write it out"
                )
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise UserError(f"{path} nests its settings more than {MAX_DEPTH} deep, which none are")
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not valid YAML ({reason})") from error
    return text


def _bounded_text(path: str | Path, most: int) -> str:
    path = Path(path)
    if path.is_file() and path.stat().st_size > most:
        raise UserError(f"{path} is {path.stat().st_size:,} bytes long, too long for settings; it was not read")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; name a file of settings")
    return read_text(path)


class DuplicateKey(ValueError):
    """An object sets a key twice."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different, json's `object_pairs_hook`; raises DuplicateKey. (Two parsers may take
    different ones of a key's values.)"""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKey(f"the key {key[:100]!r} is set twice")
        found[key] = value
    return found
