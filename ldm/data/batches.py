"""Batches: dataclasses whose fields are columns, a tensor or a list with a row for each sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")


def collate(kind: type[B], rows: Sequence[Iterable[object]]) -> B:
    """A batch of `kind`; a row is objects that have, between them, the fields of `kind` by the same names.

    Tensors are stacked, tuples of numbers become one tensor, and anything else is a list.
    """

    def column(name: str) -> Any:
        values = [next(getattr(each, name) for each in row if hasattr(each, name)) for row in rows]
        if isinstance(values[0], Tensor):
            return torch.stack(values)
        return torch.tensor(values) if isinstance(values[0], tuple) else values

    return kind(**{field.name: column(field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def join(parts: Sequence[B]) -> B:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if isinstance(values[0], Tensor) else [row for rows in values for row in rows]

    return dataclasses.replace(parts[0], **{f.name: column(f.name) for f in dataclasses.fields(parts[0])})  # type: ignore[type-var]
