"""Which values a setting may have, said in its type (`rate: Positive = 1e-4`) and checked in one place, `check`.

A number without a range has to be finite all the same: infinity means something in no setting but an interval's end.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ldm.errors import UserError

MAX_SEED = 2**63 - 1
MAX_FLOAT = 3e38  # what single precision holds
WEAKEST = 0.001  # the least strength of img2img but 0: of a thousand trained levels that is one
MAX_STEPS = 1_000_000  # of a sampler, or of a schedule's table
MAX_SIDE = 16_384  # pixels of a picture: the latent alone of a square one is 270 MB, where f is 4


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, ends included, and strictly between `above` and `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: Any) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = [f"{word} {end}" for word, end in words.items() if math.isfinite(end)]
        return " and ".join(said) or "a finite number"


class OneOf:
    """One of these words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def holds(self, value: Any) -> bool:
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


class Endless:
    """A number that may be infinite."""

    def holds(self, value: Any) -> bool:
        return not math.isnan(value)

    def __str__(self) -> str:
        return "a number"


class Filled:
    """A list that is not empty."""

    def holds(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "a list with an entry at least"


Level = Annotated[float, Endless()]
Whole = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
Steps = Annotated[int, Range(least=1, most=MAX_STEPS)]
Side = Annotated[int, Range(least=1, most=MAX_SIDE)]
Seed = Annotated[int, Range(least=0, most=MAX_SEED)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]
Few = Annotated[int, Range(least=0, most=1024)]
Counts = Annotated[tuple[Count, ...], Filled()]
Texts = Annotated[tuple[str, ...], Filled()]


def check(config: Any, where: str = "", prefix: str = "") -> None:
    """Raise UserError, with the setting's dotted name and what it may be, for the first value outside its range.

    config: a dataclass, whose fields may be dataclasses too; their names are joined by dots behind `prefix`.
    where: what the settings were read from, for the message.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check(value, where, f"{prefix}{name}.")
            continue
        for rule, part in _parts(hint, value):
            if not rule.holds(part):
                told = f"'{part[:100]}'" if isinstance(part, str) else str(list(part) if part == () else part)[:100]
                raise UserError(f"{f'{where}: ' if where else ''}{prefix}{name} must be {rule}, not {told}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _parts(hint: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """(rule, what it is about) of a value and of what is in it: the entries of a list, the values of a mapping."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from ((rule, value) for rule in hint.__metadata__)
        if not isinstance(hint.__metadata__[0], Endless):
            yield from _parts(inner[0], value)
    elif origin in (Union, types.UnionType):
        yield from (() if value is None else _parts(inner[0], value))
    elif isinstance(value, tuple | list):
        each = inner if origin is tuple and inner[-1] is not ... else inner[:1] * len(value)
        for one, item in zip(each, value, strict=True):
            yield from _parts(one, item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parts(inner[1], item)
    elif isinstance(value, float):
        yield Range(), value
        yield Range(least=-MAX_FLOAT, most=MAX_FLOAT), value
    elif isinstance(value, int):
        yield Range(most=MAX_SEED), value  # what torch and the disk hold of a whole number
