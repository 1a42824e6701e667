"""A pickle as data: its instructions are walked, and nothing in it is imported, called or constructed.

A pickle is a program for a stack machine. Python's own machine imports the functions it names and calls them, which is
how a weight file runs `os.system`. This one knows the same instructions (Python's `pickletools` decodes them), but a
name stays a name: a call becomes the value of one of the few `builders` that its reader supplies, which make plain
records of tensors, and every other class or function becomes an `Inert` object that swallows whatever is done to it.

Time and memory are bounded by MAX_OPERATIONS: an instruction makes at most one small object, and nothing is repeated.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import first_line

MAX_OPERATIONS = 500_000  # Stable Diffusion with averages and an optimizer's state takes some 100,000
MAX_DEPTH = 10_000  # unfinished containers
MAX_NAME = 1000  # letters of a class' name; longer ones could be put together again and again
MAX_NUMBER = 4096  # bits: hashing a number of megabytes as a key, again and again, would take hours

Builder = Callable[[tuple[Any, ...]], Any]


class BadPickle(Exception):
    """The bytes are not a pickle that this machine reads; the message is the reason."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle mentions: its name and no more."""

    name: str  # "torch._utils._rebuild_tensor_v2"


class Inert:
    """What stands for any object of a class that is not known here. It keeps nothing of what it is given."""

    def __init__(self, name: str = ""):
        self.name = name


def read_pickle(
    content: bytes, builders: Mapping[str, Builder], persistent: Callable[[Any], Any], start: int = 0
) -> tuple[Any, int]:
    """The plain data that the pickle at `content[start:]` describes, and where it ends.

    Dicts, lists, tuples, sets as lists, numbers, text and bytes come as themselves; `builders` says, by full name,
    which calls have a value; `persistent` gives the value of a persistent id (in torch's files: a storage).
    Raises BadPickle for anything that is no such program, is too long, or sets one key twice.
    """
    machine = _Machine(builders, persistent)
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPERATIONS:
                raise BadPickle(f"it has more than {MAX_OPERATIONS:,} instructions")
            if instruction.name == "STOP":
                return machine.pop(), stream.tell()
            machine.step(instruction.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadPickle(f"it is damaged: {first_line(error, 100)}") from error
    raise BadPickle("it ends in the middle")


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list}
_ATOMS = (str, bytes, int, float, bool, type(None), Name)  # keys whose hash takes no time; a nested tuple's may


class _Machine:
    def __init__(self, builders: Mapping[str, Builder], persistent: Callable[[Any], Any]):
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.marks = 0
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        """What was pushed since the last mark, in order."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # an IndexError below the bottom: only when there is no mark at all
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        self.marks -= 1
        return items

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks += 1
                if self.marks > MAX_DEPTH:
                    raise ValueError("it is nested too deeply")
                push(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push(_CONSTANTS[name])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                if isinstance(argument, int) and argument.bit_length() > MAX_NUMBER:
                    raise ValueError("a number of thousands of digits")
                push(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                push(argument)
            case "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                push(argument)
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET":
                push(_EMPTY[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = [self.pop() for _ in range(count)]
                push(tuple(reversed(items)))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "LIST" | "FROZENSET":
                push(self.pop_to_mark())
            case "DICT":
                push(_fill({}, self.pop_to_mark()))
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self.pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _fill(self.stack[-1], [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                _fill(self.stack[-1], items)
            case "POP":
                if self.stack[-1] is _MARK:
                    self.marks -= 1
                del self.stack[-1]
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                push(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[int(argument)])
            case "GLOBAL":
                push(Name(str(argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise ValueError("a name that is not text")
                if max(len(module), len(attribute)) > MAX_NAME:
                    raise ValueError("a name of thousands of letters")
                push(Name(f"{module}.{attribute}"))
            case "EXT1" | "EXT2" | "EXT4":
                push(Name(f"extension.{argument}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                push(self._made(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = self.pop(), self.pop(), self.pop()
                push(self._made(function, arguments))
            case "OBJ":
                function, *arguments = self.pop_to_mark()
                push(self._made(function, tuple(arguments)))
            case "INST":
                arguments = tuple(self.pop_to_mark())
                push(self._made(Name(str(argument).replace(" ", ".", 1)), arguments))
            case "BUILD":
                state = self.pop()  # plain objects (an OrderedDict's `_metadata`) do without theirs
                if isinstance(self.stack[-1], dict) and isinstance(state, dict):
                    held = state.get("_parameters")  # what a ParameterDict holds
                    if isinstance(held, dict):
                        _fill(self.stack[-1], [item for pair in held.items() for item in pair])
            case "PERSID":
                push(self.persistent(argument))
            case "BINPERSID":
                push(self.persistent(self.pop()))
            case _:
                raise ValueError(f"the instruction {name} has no place in a weight file")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError(f"items for a {type(target).__name__}")

    def _made(self, function: Any, arguments: Any) -> Any:
        """What a call gives: a builder's record, or an inert object."""
        name = function.name if isinstance(function, Name) else ""
        if name in self.builders:
            if not isinstance(arguments, tuple):
                raise ValueError(f"{name} without arguments")
            return self.builders[name](arguments)
        return Inert(name)


def _fill(target: Any, items: list[Any]) -> Any:
    """`target` with items key, value, key, value, ... set; an inert object takes them and keeps none."""
    if isinstance(target, Inert):
        return target
    if not isinstance(target, dict):
        raise ValueError(f"keys for a {type(target).__name__}")
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        plain = key if isinstance(key, _ATOMS) else Inert()  # hashed by identity
        if plain in target:
            raise BadPickle(f"it sets the key {str(plain)[:100]!r} twice")
        target[plain] = value
    return target
