"""A network's tensors under other names: which of theirs make one of ours, checked before a byte is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ldm.errors import UserError

Names: TypeAlias = Mapping[str, tuple[str, ...]]
"""Our name -> theirs. Several are one tensor of ours, cut along its first axis (open_clip's q, k, v are one matrix)."""

Rules: TypeAlias = Sequence[tuple[str, str]]
"""Regular expressions and what takes the place of each match, applied in turn."""

Shape: TypeAlias = tuple[int, ...]


def rename(name: str, rules: Rules) -> str:
    """`name` after all `rules`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def names_by(keys: Iterable[str], translate: Callable[[str], str]) -> Names:
    """The one-to-one map of `translate`; raises ValueError if two of ours meet in one of theirs."""
    names = {key: (translate(key),) for key in keys}
    if len({theirs for (theirs,) in names.values()}) != len(names):
        raise ValueError("two of our tensors have one foreign name")
    return names


def within(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


class Source(Protocol):
    """Tensors by name whose types and shapes are known without reading them: `reading.Tensors`, `Joined`."""

    def form(self, name: str) -> tuple[torch.dtype, Shape]: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


class Joined:
    """Several sources as one: the shards of a large network. Raises UserError if two hold the same name."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._of: dict[str, Source] = {}
        for file, source in sources.items():
            for name in source:
                if name in self._of:
                    raise UserError(f"{file} holds {name[:200]}, which another shard has already; copy them again")
                self._of[name] = source

    def form(self, name: str) -> tuple[torch.dtype, Shape]:
        """Type and shape, without reading it."""
        return self._of[name].form(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)


class Turned:
    """A source in which the matrix `name` is transposed: what is x W here is a linear layer, x W^T, there."""

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name

    def form(self, name: str) -> tuple[torch.dtype, Shape]:
        """Type and shape, without reading it."""
        dtype, shape = self._source.form(name)
        return dtype, shape[::-1] if name == self._name else shape

    def __getitem__(self, name: str) -> Tensor:
        return self._source[name].T.contiguous() if name == self._name else self._source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)


class Translated(Mapping[str, Tensor]):
    """Tensors under our names, each made of theirs when it is asked for; none is kept.

    `shapes` are ours. Axes of length 1 may be missing or too many at the end of theirs: a 1 x 1 convolution is a
    linear layer. Raises UserError, at once and naming them, if tensors are missing, unexpected or of another shape.
    `what` names them in that error ("the U-Net in sd.ckpt"), `scope` lists the names in `source` that belong here;
    ours among `data` hold bytes, all others floats.
    """

    def __init__(
        self,
        source: Source,
        names: Names,
        shapes: Mapping[str, Shape],
        what: str,
        scope: Iterable[str],
        data: Iterable[str] = (),
    ) -> None:
        self._source, self._names, self._shapes = source, names, shapes
        _check(source, wanted(names, shapes), scope, what, {name for ours in data for name in names[ours]})

    def __getitem__(self, name: str) -> Tensor:
        pieces = [self._source[theirs] for theirs in self._names[name]]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return joined.reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def theirs(self) -> dict[str, Shape]:
        """The foreign names that it is made of, with the shapes they should have."""
        return wanted(self._names, self._shapes)

    def form(self, name: str) -> tuple[torch.dtype, Shape]:
        """Type, as it is stored, and shape, without reading it."""
        return self._source.form(self._names[name][0])[0], self._shapes[name]


class Together(Mapping[str, Tensor]):
    """Several networks' tensors, each key with its network's name in front; each is read when it is asked for."""

    def __init__(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._states = states

    def __getitem__(self, name: str) -> Tensor:
        part, _, key = name.partition(".")
        return self._states[part][key]

    def __iter__(self) -> Iterator[str]:
        return (f"{part}.{key}" for part, state in self._states.items() for key in state)

    def __len__(self) -> int:
        return sum(map(len, self._states.values()))


def exported(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The inverse: theirs -> tensors of `state`, cut where one of ours is several of theirs; in the shapes of ours."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = state[ours]
        pieces = (value,) if len(theirs) == 1 else [piece.clone() for piece in value.chunk(len(theirs))]
        found |= zip(theirs, pieces, strict=True)
    return found


def wanted(names: Names, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Theirs -> the shape that it should have."""
    found = {}
    for ours, theirs in names.items():
        shape = shapes[ours]
        found |= {name: (shape[0] // len(theirs), *shape[1:]) if len(theirs) > 1 else shape for name in theirs}
    return found


def _check(source: Source, shapes: Mapping[str, Shape], scope: Iterable[str], what: str, data: Collection[str]) -> None:
    missing = [name for name in shapes if name not in source]
    unexpected = [name for name in scope if name not in shapes]
    misshapen = []
    for name, shape in shapes.items():
        if name in source:
            dtype, found = source.form(name)
            if dtype != torch.uint8 if name in data else not dtype.is_floating_point:
                kind = "bytes" if name in data else "floats"
                misshapen.append(f"{name} holds {str(dtype).removeprefix('torch.')} and should hold {kind}")
            elif _bare(found) != _bare(shape):
                misshapen.append(f"{name} is {tuple(found)} and should be {shape}")
    groups = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    told = [f"{len(names)} {kind} ({some(names)})" for kind, names in groups if names]
    if told:
        raise UserError(f"{what} is of another architecture than its config says: tensors {'; '.join(told)}")


def _bare(shape: Sequence[int]) -> Shape:
    """Without the axes of length 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def fingerprint(state: Mapping[str, Tensor], stored: bool = True) -> str:
    """sha256, in hex, of names, types, shapes and bytes of all tensors, in the order of their names: as they are
    `stored`, or all floats in float32, as which half precision and full agree where the numbers do."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        value = value if stored or not value.is_floating_point() else value.float()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few, for a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
