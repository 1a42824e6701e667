"""Frozen dataclasses of settings <-> YAML, `key=value` words, JSON. Which settings there are is said in config.py.

A key that does not exist is an error that names the nearest one that does, and so is a value outside its range
(ranges.py). Values are data: nothing in a file is run, resolved or interpolated.

A field that may hold one of several dataclasses is written as their union, `UNetConfig | PriorConfig`. Each of them has
a field `kind`, whose default is its name; where settings say no kind, it is that of the default, or the first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm.errors import UserError, first_line, nearest
from ldm.plain import read_yaml_text
from ldm.ranges import check

T = TypeVar("T")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """`cls` with the YAML of `path` and then `overrides` ("data.size=64") merged over its defaults.

    Raises UserError for a file that cannot be read, YAML that does not parse, an unknown key (the nearest known
    one is named) and a value of the wrong type or outside its range.
    """
    if path:
        from_dict(cls, read(path), str(path))  # by itself first, so that what is wrong is said of the right place
    return from_dict(cls, read(path, overrides), "the arguments")


def read(path: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[Any, Any]:
    """What the YAML of `path` and then `overrides` say, nested and nothing else; raises UserError as `load` does."""
    from omegaconf import OmegaConf

    where = str(path) if path else "the arguments"
    try:
        plain = OmegaConf.to_container(OmegaConf.create(read_yaml_text(path) if path else {}), resolve=False)
        if not isinstance(plain, dict):
            raise UserError(f"{path} is not a mapping of settings; see configs/ for examples")
        for word in overrides:
            where = f"'{word[:100]}'"
            key, given, _ = word.partition("=")
            if not given:
                raise UserError(f"'{word}' is not of the form key=value")
            value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)
            for name in key.split("."):
                value = value[name]
            _replace(plain, key.split("."), value)
    except UserError:
        raise
    except Exception as error:  # at odd keys (a[0]) and values (2001-99-99) OmegaConf and yaml fail in any way
        raise UserError(f"{where}: {first_line(error, 300)}") from error
    return plain


def from_dict(cls: type[T], plain: Any, where: str) -> T:
    """`cls` from plain dicts, lists and numbers, checked key by key, type by type and range by range; UserError.

    Values are data: interpolations and resolvers are refused, since configs may come from strangers.
    """
    if not isinstance(plain, dict):
        raise UserError(f"{where}: expected a mapping of settings, found {type(plain).__name__}")
    made = _Reader(cls, where).group(cls, cls(), plain, "")
    check(made, where)
    return made


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Plain values -> those of the fields' types. `root` is what is read, for the names of its settings."""

    root: Any
    where: str

    def group(self, cls: Any, base: Any, plain: dict[Any, Any], prefix: str) -> Any:
        """`base`, a `cls`, with what `plain` says of it."""
        hints, changes = get_type_hints(cls), {}
        for key, value in plain.items():
            name = f"{prefix}{str(key)[:100]}"
            if key not in hints:
                raise UserError(f"{self.where}: unknown setting '{name}'{self._instead(str(key), name, hints)}")
            value = "" if value is None and hints[key] is str else value  # to YAML, what stands in `key=` is null
            changes[key] = self.value(hints[key], getattr(base, key), value, name)
        return dataclasses.replace(base, **changes)

    def value(self, hint: Any, default: Any, value: Any, name: str) -> Any:
        origin, inner = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None and type(None) in inner:
                return None
            groups, hint = _groups(hint), inner[0]
            if len(groups) > 1:
                hint = self._one_of(groups, default, value, name)
                default = default if type(default) is hint else None
            return self.value(hint, default, value, name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                self._refuse(name, "a group of settings", value)
            return self.group(hint, hint() if default is None else default, value, f"{name}.")  # type: ignore[operator]
        if origin is dict:
            if not isinstance(value, dict):
                self._refuse(name, "a mapping, as {a: b}", value)
            return {str(key): self.value(inner[1], None, item, f"{name}.{key}") for key, item in value.items()}
        if origin in (tuple, list):
            if not isinstance(value, list | tuple):
                self._refuse(name, "a list, as [a, b]", value)
            fixed = origin is tuple and inner[-1] is not ...
            if fixed and len(value) != len(inner):
                self._refuse(name, f"a list of {len(inner)}", value)
            return origin(self.value(inner[i if fixed else 0], None, item, name) for i, item in enumerate(value))
        return self._scalar(hint, value, name)

    def _one_of(self, groups: Sequence[Any], default: Any, value: Any, name: str) -> Any:
        """The dataclass among `groups` that the settings in `value` are of."""
        kinds = {group().kind: group for group in groups}
        kind = value.get("kind", getattr(default, "kind", next(iter(kinds)))) if isinstance(value, dict) else ""
        if isinstance(value, dict) and not (isinstance(kind, str) and kind in kinds):
            self._refuse(f"{name}.kind", f"one of {', '.join(kinds)}", kind)
        return kinds.get(kind, groups[0])

    def _scalar(self, hint: Any, value: Any, name: str) -> Any:
        if hint is Any and isinstance(value, str | int | float):  # a sampler's option, whose type its catalogue knows
            return value
        try:
            if hint is str and isinstance(value, str | int | float):
                if "${" in str(value):
                    raise UserError(
                        f"{self.where}: '{str(value)[:99]}' has an interpolation, which settings may not; write the "
                        "value itself"
                    )
                return value if isinstance(value, str) else json.dumps(value)
            if hint is bool:
                return BOOLS[str(value).lower()]
            broken = hint is int and isinstance(value, float) and value % 1 != 0
            if hint in (int, float) and not isinstance(value, bool) and not broken:
                return hint(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            pass
        wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        self._refuse(name, wanted.get(hint, "a number or a text"), value)

    def _refuse(self, name: str, wanted: str, value: Any) -> NoReturn:
        raise UserError(f"{self.where}: {name} must be {wanted}, not {str(value)[:40]!r}")

    def _instead(self, key: str, name: str, known: Iterable[str]) -> str:
        """What may be meant: one of the same name elsewhere, or a near one; else all that there are."""
        everywhere = [f"'{other}'" for other in names(self.root) if other.rpartition(".")[2] == key]
        if everywhere:
            return f"; did you mean {' or '.join(everywhere)}?"
        near = nearest(key, known)
        return f"; did you mean '{name.removesuffix(key)}{near}'?" if near else f"; there are {', '.join(known)}"


def names(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings of a dataclass."""
    for name, hint in get_type_hints(cls).items():
        inner = (names(each, f"{prefix}{name}.") for each in _groups(hint))
        yield from dict.fromkeys(itertools.chain(*inner)) if _groups(hint) else [f"{prefix}{name}"]


def _groups(hint: Any) -> list[Any]:
    """The dataclasses that a field of this type may hold."""
    return [each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)]


def listing(cls: Any, base: Any = None, prefix: str = "") -> Iterator[str]:
    """A line for each setting of a dataclass, and then of those in it: name, default, and its comment in the source.
    Where settings are one of several kinds, those of each other kind follow.

    base: whose values are the defaults, where not the dataclass' own.
    """
    from ldm.arguments import comments

    base, about, groups = base or cls(), comments(cls), list[str]()
    for name, hint in get_type_hints(cls).items():
        value = getattr(base, name)
        if dataclasses.is_dataclass(value):
            for kind in (type(value), *(other for other in _groups(hint) if other is not type(value))):
                own = value if kind is type(value) else kind()
                groups += ["", (kind.__doc__ or "").splitlines()[0], *listing(kind, own, f"{prefix}{name}.")]
        else:
            said = "" if value == "" else json.dumps(value, ensure_ascii=False).replace('"', "")
            yield f"  {f'{prefix}{name}={said}':<34}  {about.get(name, '')}".rstrip()
    yield from groups


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
    plain, hints = to_dict(config), get_type_hints(type(config))
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, default = getattr(config, f.name), _default(f)
        if value == default:
            continue
        found[f.name] = plain[f.name]
        if dataclasses.is_dataclass(value):
            first = type(value) is _groups(hints[f.name])[0]  # whose kind goes without saying
            found[f.name] = changed(value) | ({} if first else {"kind": plain[f.name]["kind"]})
    return found


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
