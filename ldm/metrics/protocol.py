"""What stands beside the figures: all that is needed to measure them again, and whether two results compare.

A result has five parts. `figures`: name -> number. `subject`: what was measured, a model or pictures. `protocol`: how;
figures of two subjects compare if and only if it is the same. `sources`: what the pictures and captions were read from,
as the user named it, to measure again; the protocol has their hashes. `made_on`: versions and machine, on which a
figure depends in its last digits.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm.errors import UserError
from ldm.files import atomic_write_text
from ldm.metrics.tables import tables
from ldm.model import Model
from ldm.plain import leaves, read_json

PACKAGES = ("torch-fidelity", "torchmetrics", "open_clip_torch", "pillow", "numpy")


def result(
    figures: Mapping[str, Any], subject: Mapping[str, Any], protocol: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """The document of one evaluation; `more` are parts that only one command has."""
    return {
        "figures": dict(figures),
        **more,
        "subject": dict(subject),
        "protocol": dict(protocol),
        "made_on": {"ldm": ldm.__version__, "torch": str(torch.__version__), **versions(), **machine()},
    }


def subject_of(model: Model, weights: str = "auto") -> dict[str, Any]:
    """Name and hash of a model, and which of its weights were used; `weights` is what `ldm.load` was asked for.

    "ema" or "raw" where the checkpoint has both, "the only ones" where it has one set and does not say which.
    """
    both = model.checkpoint is not None and model.checkpoint.two_sets
    used = weights if weights != "auto" else "ema" if both else "the only ones"
    return {"model": model.name, "hash": model.hash, "weights": used, "notices": list(model.notices)}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    return {"python": platform.python_version(), "hardware": platform.machine()}


def write(document: Mapping[str, Any], path: str | Path) -> None:
    """As JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """A document that `write` wrote; raises UserError for anything else."""
    document, parts = read_json(path), ("figures", "subject", "protocol")
    if not all(isinstance(document.get(part), dict) for part in parts):
        raise UserError(f"{path} holds no result of scripts/evaluate.py; --output writes one")
    return document


def unlike(a: Mapping[str, Any], b: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """A phrase for each thing in which two protocols differ; what is in `ignore`, or below it, may."""
    one, other = _flat(a), _flat(b)

    def meant(name: str) -> bool:
        return any(name == word or name.startswith(f"{word}.") for word in ignore)

    names = [name for name in {**one, **other} if one.get(name) != other.get(name) and not meant(name)]
    return [f"{name} is {_told(one.get(name))} and {_told(other.get(name))}" for name in names]


def compare(paths: tuple[str, str], ignore: Sequence[str] = ()) -> str:
    """A table of both results' figures side by side.

    Raises UserError where they were measured differently, but for what is in `ignore` ("drawing.cfg").
    """
    a, b = (read(path) for path in paths)
    found = unlike(a["protocol"], b["protocol"], ignore)
    if found:
        raise UserError(f"{paths[0]} and {paths[1]} do not compare: {'; '.join(found)}")
    columns = [Path(path).stem[-18:] for path in paths]
    rows = [_numbers(document["figures"]) for document in (a, b)]
    names = {name: 0.0 for row in rows for name in row}
    differences = {name: rows[1][name] - rows[0][name] for name in names if _in_both(name, rows)}
    return tables([{**dict.fromkeys(names), **rows[0]}, rows[1], differences], [*columns, "difference"])  # type: ignore[dict-item]


def _in_both(name: str, rows: Sequence[Mapping[str, float]]) -> bool:
    return all(name in row for row in rows) and not name.endswith(" deviation")


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in _flat(figures).items() if isinstance(value, int | float)}


def _flat(plain: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c": [2]}; a list of mappings with names is a mapping."""
    return dict(leaves(_by_name(plain)))


def _by_name(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(i, dict) and isinstance(i.get("name"), str) for i in value):
        value = {item["name"]: item for item in value}
    return {key: _by_name(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _told(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
