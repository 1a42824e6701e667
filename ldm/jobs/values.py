"""Values that a caller gives, in Python's own types, or a sentence that says what is wrong."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import UserError


def whole(value: Any, what: str) -> int:
    """`value`, numpy's and torch's numbers too, as an int; raises UserError for what is no whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{what} is {shown(value)}, which is not a whole number") from error


def real(value: Any, what: str) -> float:
    """`value` as Python's own number, an int or a float, which may be NaN; raises UserError for what is no number."""
    number = value.item() if getattr(value, "shape", None) == () else value  # numpy's and torch's
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UserError(f"{what} is {shown(value)}, which is not a number")
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        raise UserError(f"{what} is a number of more than 300 digits; choose a smaller one")
    return number


def word(value: Any, what: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{what} is {shown(value)}, which is not a text")
    return os.fspath(value)


def reals(value: Any, what: str) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{what} is {shown(value)}, which is not a list of numbers")
    return tuple(real(one, f"a number of {what}") for one in value)


def wholes(value: Any, what: str) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{what} is {shown(value)}, which is not a list of whole numbers")
    return tuple(whole(one, f"a number of {what}") for one in value)


def table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} is {shown(value)}; give each by its name, as {{'eta': 1}}")
    return dict(value)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
