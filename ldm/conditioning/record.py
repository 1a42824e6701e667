"""What the network is told beside (x, t): caption, vector, class, extra channels; one row for each picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B pictures; a part that is None is not given to the network.

    The null condition of classifier-free guidance (Ho and Salimans 2022) is one of these too: for captions, the
    context of the empty prompt. Raises ValueError if there is no part, or the parts differ in B.
    """

    context: Tensor | None  # (B, L, D): the encoded caption
    vector: Tensor | None = None  # (B, V): sizes, pooled text, anything that enters beside t
    classes: Tensor | None = None  # (B,) long
    channels: Tensor | None = None  # (B, C, h, w): concatenated to x (mask and masked picture, depth)

    def __post_init__(self) -> None:
        sizes = {name: len(part) for name, part in _parts(self).items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the parts of a conditioning must be there and agree in batch size, found {sizes}")

    def __len__(self) -> int:
        """B."""
        return len(next(iter(_parts(self).values())))

    def __getitem__(self, rows: slice) -> Conditioning:
        """The conditions of some of the pictures, still a batch: `c[2:4]`, `c[:1]`."""
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every part; `dtype` is for the floating-point parts only, classes stay whole numbers."""
        return self._map(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    def repeat(self, n: int) -> Conditioning:
        """Each row n times in succession, (a, b) -> (a, a, b, b): n pictures of each prompt, in the prompts' order."""
        return self._map(lambda part: part.repeat_interleave(n, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            **{f.name: None if (part := getattr(self, f.name)) is None else function(part) for f in fields(self)}
        )


def cat(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Join batches, in order; raises ValueError if a part is there in one and not in another."""
    names = [set(_parts(c)) for c in conditionings]
    if any(n != names[0] for n in names):
        raise ValueError(f"conditionings to join must have the same parts, found {[sorted(n) for n in names]}")
    joined = {name: torch.cat([getattr(c, name) for c in conditionings]) for name in names[0]}
    return Conditioning(**{"context": None, **joined})


def _parts(conditioning: Conditioning) -> dict[str, Tensor]:
    named = {f.name: getattr(conditioning, f.name) for f in fields(conditioning)}
    return {name: part for name, part in named.items() if part is not None}
