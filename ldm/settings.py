"""Frozen dataclasses of settings <-> YAML, `key=value` words, JSON. Which settings there are is said in config.py.

A key that does not exist is an error that names the nearest one that does. Values are data: nothing in a file is run,
resolved or interpolated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ldm.errors import UserError
from ldm.plain import read_yaml_text

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """`cls` with the YAML of `path` and then `overrides` ("data.size=64") merged over its defaults.

    Raises UserError for a file that cannot be read, YAML that does not parse, an unknown key (the nearest known
    one is named) and a value of the wrong type.
    """
    from omegaconf import OmegaConf

    where = str(path) if path else "the arguments"
    try:
        plain = OmegaConf.to_container(OmegaConf.create(read_yaml_text(path) if path else {}), resolve=False)
        if not isinstance(plain, dict):
            raise UserError(f"{path} is not a mapping of settings; see configs/ for examples")
        for word in overrides:
            key, given, _ = word.partition("=")
            if not given:
                raise UserError(f"'{word}' is not of the form key=value")
            value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)
            for name in key.split("."):
                value = value[name]
            if value is None and word == f"{key}=" and _holds(cls, key.split(".")) is str:
                value = ""  # to YAML it is null
            _replace(plain, key.split("."), value)
    except UserError:
        raise
    except Exception as error:  # at odd keys (a[0]) and values (2001-99-99) OmegaConf and yaml fail in any way
        raise UserError(f"{where}: {_first_line(error)}") from error
    return from_dict(cls, plain, where)


def from_dict(cls: type[T], plain: Any, where: str) -> T:
    """`cls` from plain dicts, lists and numbers, checked key by key and type by type; raises UserError.

    Values are data: interpolations and resolvers are refused, since configs may come from strangers.
    """
    from omegaconf import OmegaConf

    if not isinstance(plain, dict):
        raise UserError(f"{where}: expected a mapping of settings, found {type(plain).__name__}")
    _check_keys(cls, plain, where, "")
    _refuse_interpolations(plain, where)
    light, tables = _without_tables(plain)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(light))
        made = OmegaConf.to_object(merged)
    except Exception as error:  # OmegaConf's own, and any other where containers of two kinds meet
        raise UserError(f"{where}: {_first_line(error)}") from error
    return _tuples(made, tables, where)  # type: ignore[return-value]


def _replace(plain: dict[Any, Any], key: Sequence[str], value: Any) -> None:
    """Set a nested key. A value takes the old one's place whole: data.where={} lifts a file's filter."""
    for name in key[:-1]:
        if not isinstance(plain.get(name), dict):
            plain[name] = {}
        plain = plain[name]
    plain[key[-1]] = value


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain dicts, lists and numbers, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def changed(config: Any) -> dict[str, Any]:
    """What of `to_dict` differs from the dataclass' own defaults, nested ones too."""
    plain = to_dict(config)
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), _default(f)
        if value == default:
            continue
        found[f.name] = changed(value) if dataclasses.is_dataclass(value) else plain[f.name]
    return found


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _check_keys(cls: Any, plain: dict[Any, Any], where: str, prefix: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in plain.items():
        if key not in fields:
            key = str(key)[:100]
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown setting '{prefix}{key}'; did you mean '{prefix}{near[0]}'?")
        nested = _nested(cls, key)
        if nested is not None and isinstance(value, dict):
            _check_keys(nested, value, where, f"{prefix}{key}.")


def _nested(cls: Any, name: str) -> Any:
    """The dataclass that field `name` of `cls` holds, or None."""
    import typing

    hint = typing.get_type_hints(cls)[name]
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _holds(cls: Any, key: Sequence[str]) -> Any:
    """The type of the field at a nested key; None where there is none."""
    import typing

    for name in key[:-1]:
        cls = _nested(cls, name) if cls and name in typing.get_type_hints(cls) else None
    return typing.get_type_hints(cls).get(key[-1]) if cls else None


def _refuse_interpolations(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _refuse_interpolations(item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_interpolations(item, where)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: '{value[:99]}' has an interpolation, which settings may not; write the value itself")


TABLE = 100  # whole numbers; OmegaConf takes 0.1 ms for each, and a tower's list of tokens has thousands


def _without_tables(plain: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`plain` without its long lists of whole numbers, and these by key, nested as they were."""
    light, tables = {}, {}
    for key, value in plain.items():
        if isinstance(value, dict):
            light[key], inner = _without_tables(value)
            if inner:
                tables[key] = inner
        elif isinstance(value, list) and len(value) > TABLE and all(type(item) is int for item in value):
            light[key], tables[key] = value[:1], tuple(value)  # one stays: its field must be one of numbers
        else:
            light[key] = value
    return light, tables


def _tuples(value: Any, tables: dict[str, Any], where: str) -> Any:
    """OmegaConf may give lists where the dataclass says tuple; put tuples back, and the tables, all the way down."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if isinstance(item, list | tuple) and str(f.type).startswith("tuple"):
            strangers = [entry for entry in item if not isinstance(entry, str | int | float)]
            if strangers:  # OmegaConf takes [[1]] and [null] for a list of numbers
                raise UserError(f"{where}: {f.name} is a list with {str(strangers[0])[:40]} in it")
            changes[f.name] = tables.get(f.name, tuple(item))
        elif dataclasses.is_dataclass(item):
            changes[f.name] = _tuples(item, tables.get(f.name, {}), where)
    return dataclasses.replace(value, **changes)


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "problem", None) or error).strip()  # yaml's errors begin with what it was doing
    return text.splitlines()[0][:300] if text else type(error).__name__
