"""The command line, for all scripts and tools: flags made of dataclasses' fields, and mistakes told in one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ldm.device import DEVICES, GPU, PRECISIONS
from ldm.errors import UserError, instead
from ldm.ranges import MAX_SEED, MAX_SIDE

NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)  # a value that looks like an option
WORDS = {int: "it must be a whole number", float: "it must be a number"}
LETTERS = {int: "N", float: "X", str: "TEXT"}


class Help(argparse.RawDescriptionHelpFormatter):
    """A default stands behind each option's line."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default in (None, "", [], argparse.SUPPRESS) or action.default is False
        return f"{action.help or ''}{'' if plain else ' [%(default)s]'}".strip()


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors, its subcommands' too. An abbreviated option is an unknown one."""

    def __init__(
        self,
        *,
        formatter_class: Any = Help,
        allow_abbrev: bool = False,
        **others: Any,  # argparse itself makes the subcommands' parsers
    ) -> None:
        super().__init__(formatter_class=formatter_class, allow_abbrev=allow_abbrev, **others)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """An unknown option is told before a missing one, which it was probably meant to be."""
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(words)
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: Iterable[str]) -> None:
        known, commands = self._option_string_actions, self._commands()
        for word in words:
            if word == "--" or (commands and word in commands.choices):  # what follows is the subcommand's
                return
            name = word.partition("=")[0]
            if not word.startswith("-") or word == "-" or " " in word or name in known or NUMBER.match(word):
                continue
            if "=" in word and any(action.metavar == "key=value" for action in self._actions):
                raise UserError(f"'{word}' is no option; settings are written without dashes, {word.lstrip('-')}")
            bare = {long.strip("-"): long for long in known}
            near = difflib.get_close_matches(name.strip("-"), bare, n=1)
            meant = f"did you mean '{bare[near[0]]}'?" if near else "--help lists those there are"
            raise UserError(f"unknown option '{name}'; {meant}")

    def _commands(self) -> argparse._SubParsersAction[Any] | None:
        return next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind: Any = action.type or str
        try:
            value = kind(arg_string)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{_name(action)} is {arg_string}; {error}") from None
        except (TypeError, ValueError):
            kind = kind.kind if isinstance(kind, Bounded) else kind
            raise UserError(f"{_name(action)} is '{arg_string[:100]}'; {WORDS.get(kind, 'it is invalid')}") from None
        if value != value or (kind is Path and not arg_string):
            raise UserError(f"{_name(action)} is {'nan' if arg_string else 'empty'}; give it a value, or leave it out")
        return value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            raise UserError(f"unknown command '{value}'{instead(value, _named(action))}")
        raise UserError(f"{_name(action)} is '{value}'{instead(str(value), map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        """What argparse found, in our words where it is of the usual kinds."""
        about, _, problem = message.partition(": ")
        commands = self._commands()
        if about == "the following arguments are required":
            optional = [action.metavar for action in self._actions if action.nargs in ("*", "?")]  # argparse names them
            names = [name for name in problem.split(", ") if name not in optional]
            if commands and names[-1] in (commands.dest, commands.metavar):
                raise UserError(f"say what to do, one of {', '.join(_named(commands))}; --help has a line on each")
            be = "is" if len(names) == 1 else "are"
            raise UserError(f"{' and '.join(names)} {be} missing; --help says what {be} meant")
        if about == "unrecognized arguments":
            raise UserError(f"no option takes '{problem[:100]}'; quote what has spaces in it; --help lists the options")
        if not about.startswith("argument "):
            raise UserError(message)
        name = about.removeprefix("argument ").split("/")[-1]
        if problem.startswith("expected "):
            count = problem.removeprefix("expected ").removesuffix("s").removesuffix(" argument")
            count = count.replace("one", "a value") if count.endswith("one") else f"{count} values"
            raise UserError(f"{name} needs {count}; one that begins with a dash is written {name}=-...")
        raise UserError(f"{name}: {problem}; --help lists the options")


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def _named(commands: argparse._SubParsersAction[Any]) -> list[str]:
    """The subcommands that --help shows."""
    return [choice.dest for choice in commands._choices_actions]


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Bounded:
    """A flag's type: a number from `low` to `high`."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf

    def __call__(self, word: str) -> float:
        value = self.kind(word)
        if not self.low <= value <= self.high:
            bounds = f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"
            bounds = "a finite number above 0" if self.low == SMALLEST else bounds
            raise argparse.ArgumentTypeError(f"it must be {bounds}")
        return value


SMALLEST = math.ulp(0.0)
COUNT, NATURAL = Bounded(int, 1), Bounded(int, 0)  # whole numbers, from 1 and from 0 on
POSITIVE = Bounded(float, SMALLEST, sys.float_info.max)
SIDE = Bounded(int, 1, MAX_SIDE)  # pixels
SEED = Bounded(int, 0, MAX_SEED // 2)  # and as many pictures behind it as there may be


# ---------------------------------------------------------------- flags


def add_machine(add: Callable[..., Any], device: str | None = "auto", precision: str | None = "auto") -> None:
    """--device and --precision, by a parser's or group's `add_argument`."""
    add(
        "--device",
        type=_device,
        metavar="NAME",
        default=device,
        help=f"{', '.join(DEVICES)}; auto: a GPU if there is one",
    )
    add("--precision", choices=("auto", *PRECISIONS), default=precision, help="auto: fp16 on a GPU, else fp32")


def _device(word: str) -> str:
    if word not in DEVICES and not re.fullmatch(GPU, word):
        raise UserError(f"--device is '{word[:100]}'{instead(word, DEVICES)}")
    return word


def add_fields(add: Callable[..., Any], cls: type, names: Sequence[str] = (), usual: Any = None) -> None:
    """A flag for each field of a dataclass, or for each of `names`, by a parser's or group's `add_argument`.

    --cfg-rescale for `cfg_rescale`, of the field's type; its help is the comment behind the field, in whose words None
    is the default. What is not given is None in the namespace: `taken` has what is. `usual`: an instance that has the
    defaults, in place of the class' own.
    """
    about, hints = comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if names and field.name not in names:
            continue
        text = about.get(field.name, "").replace("None:", "default:").replace("%", "%%")
        value = field.default if usual is None else getattr(usual, field.name)
        if isinstance(value, int | float | str) and not isinstance(value, bool) and value != "":
            text += f" [{value:g}]" if isinstance(value, float) else f" [{value}]".replace("%", "%%")
        add(f"--{field.name.replace('_', '-')}", dest=field.name, help=text.strip(), **_form(hints[field.name]))


def taken(arguments: argparse.Namespace, cls: type, names: Sequence[str] = ()) -> dict[str, Any]:
    """What was given of the fields of `cls`, or of `names`, by name: the counterpart of `add_fields`."""
    found = {
        name: getattr(arguments, name, None) for name in names or [field.name for field in dataclasses.fields(cls)]
    }
    given = {name: value for name, value in found.items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, where it has one and the source is there."""
    try:
        source = Path(sys.modules[cls.__module__].__file__ or "").read_text(encoding="utf-8")
    except OSError:
        return {}
    body = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", body.group() if body else "", re.MULTILINE))


def _form(hint: Any) -> dict[str, Any]:
    """The words of `add_argument` for a field of a type: a number, text, a switch, or a list of these."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        (hint,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return {**_form(kinds[0]), "nargs": "+" if Ellipsis in kinds else len(kinds)}
    if hint is bool:
        return {"action": "store_const", "const": True}
    return {"type": hint, "metavar": LETTERS[hint]}
