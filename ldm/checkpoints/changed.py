"""A source of tensors some of which are made of others: put in another order, turned, or not in the file at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoints.state import Shape, Source


@dataclass(frozen=True)
class Made:
    """A tensor that stands in the place of a stored one, of the type of the stored one `like`, or of that type."""

    shape: Shape
    make: Callable[[], Tensor]
    like: str | torch.dtype


class Changed:
    """`source` with `made` tensors, under names that it may or may not have."""

    def __init__(self, source: Source, made: Mapping[str, Made]) -> None:
        self._source, self._made = source, made

    def form(self, name: str) -> tuple[torch.dtype, Shape]:
        """Type and shape, without reading it."""
        if name not in self._made:
            return self._source.form(name)
        like = self._made[name].like
        return like if isinstance(like, torch.dtype) else self._source.form(like)[0], self._made[name].shape

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name].make() if name in self._made else self._source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._made or name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._source, *self._made]))
