"""A pickle as data: its instructions are walked, and nothing in it is imported, called or constructed.

A pickle is a program for a stack machine. Python's own machine imports the functions it names and calls them, which is
how a weight file runs `os.system`. This one knows the same instructions (Python's `pickletools` decodes them), but a
name stays a name: a call becomes the value of one of the few `builders` that its reader supplies, which make plain
records of tensors, and every other class or function becomes an `Inert` object that swallows whatever is done to it.

Time and memory are bounded by MAX_OPERATIONS: an instruction makes at most one small object, and nothing is repeated.

torch.load(weights_only=True) runs nothing either, but cannot take this place (as of torch 2.13): a key of tuples in
tuples keeps it busy for ever, a view of 2^40 numbers over a stored few is loaded, a key set twice is not told; pickle
protocols 4 and 5 are unknown to it, and an old stream is read whole into memory.
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
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_FRESH: Mapping[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list},
}
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
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        self.marks -= 1
        return items[::-1]

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > MAX_NUMBER:
                raise ValueError("a number of thousands of digits")
            return push(argument)
        if name in _FRESH:
            return push(_FRESH[name]())
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks += 1
                if self.marks > MAX_DEPTH:
                    raise ValueError("it is nested too deeply")
                push(_MARK)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(name[-1]))]
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
                self.marks -= self.stack.pop() is _MARK
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
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if name == "NEWOBJ_EX":
                    self.pop()  # keywords, which no builder takes
                arguments, function = self.pop(), self.pop()
                push(self._made(function, arguments))
            case "OBJ":
                function, *arguments = self.pop_to_mark()
                push(self._made(function, tuple(arguments)))
            case "INST":
                arguments = tuple(self.pop_to_mark())
                push(self._made(Name(str(argument).replace(" ", ".", 1)), arguments))
            case "BUILD":
                state = self.pop()  # plain objects (an OrderedDict's `_metadata`) do without theirs
                held = state.get("_parameters") if isinstance(state, dict) else None  # what a ParameterDict holds
                if isinstance(self.stack[-1], dict) and isinstance(held, dict):
                    _fill(self.stack[-1], [item for pair in held.items() for item in pair])
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
