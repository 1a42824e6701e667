"""Condition: everything that a network is told beside (x, t), one row for each picture.

Parts are sorted by how they enter a network, not by what they say: a context is attended to, a vector, a label and a
guidance scale are added to the embedding of t, planes are concatenated to x. `encoder.py` makes conditions, networks
read them, and nothing between the two looks inside. Who guides adds the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of B pictures; a part that is None is not given to the network.

    The null condition of classifier-free guidance (Ho and Salimans 2022) is one of these too: for captions, the
    context of the empty prompt. Raises ValueError if there is no part, or the parts differ in B.
    """

    context: Tensor | None = None  # (B, L, D): the encoded caption
    mask: Tensor | None = None  # (B, L) bool: the context's places that are read; None: all of them
    vector: Tensor | None = None  # (B, V): pooled text, sizes, anything that enters beside t
    label: Tensor | None = None  # (B,) long
    planes: Tensor | None = None  # (B, C, h, w): mask and masked picture, depth
    guidance: Tensor | None = None  # (B,) float: the scale cfg of networks that are told it

    def __post_init__(self) -> None:
        sizes = {name: len(part) for name, part in self.parts().items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the parts of a condition must be there and agree in batch size, found {sizes}")
        if self.mask is not None and (self.context is None or self.mask.shape != self.context.shape[:2]):
            raise ValueError(f"a mask {tuple(self.mask.shape)} belongs to a context (B, L, D) of the same B and L")

    def __len__(self) -> int:
        """B."""
        return len(next(iter(self.parts().values())))

    def __getitem__(self, rows: slice) -> Condition:
        """The conditions of some of the pictures, still a batch: `c[2:4]`, `c[:1]`."""
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Condition:
        """Every part on `device`."""
        return self._map(lambda part: part.to(device))

    def parts(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: function(part) for name, part in self.parts().items()})


def cat(conditions: Sequence[Condition]) -> Condition:
    """Join batches, in order; contexts of different lengths are padded, with a mask that says so.

    Raises ValueError if a part is there in one and not in another.
    """
    names = [set(condition.parts()) - {"mask"} for condition in conditions]
    if any(some != names[0] for some in names):
        raise ValueError(f"conditions to join must have the same parts, found {[sorted(some) for some in names]}")
    padded = _of_one_length(conditions)
    return Condition(**{name: torch.cat([getattr(c, name) for c in padded]) for name in padded[0].parts()})


def lerp(a: Condition, b: Condition, share: float, behind: int = 0) -> Condition:
    """Between two conditions of the same parts, row by row: numbers are mixed, labels and masks are `a`'s.

    A context's places that only one of them reads are read. Its last `behind` places are of another tower, and mixed
    with the other's last. Raises ValueError if they differ in more than that.
    """
    padded_a, padded_b = _of_one_length([a, b], behind)
    kept, others = padded_a.parts(), padded_b.parts()
    if kept.keys() != others.keys():
        raise ValueError(f"conditions to mix must have the same parts, found {sorted(kept)} and {sorted(others)}")
    for name, other in others.items():
        if name == "mask":
            kept[name] = kept[name] | other
        elif name != "label":
            kept[name] = torch.lerp(kept[name], other, share)
    return Condition(**kept)


def widths(condition: Condition) -> dict[str, int]:
    """How wide each part is that a network reads, by name: D, V, C, and 1 of a label."""
    parts = {name: part for name, part in condition.parts().items() if name not in ("mask", "planes", "guidance")}
    return {name: part.shape[-1] if part.ndim > 1 else 1 for name, part in parts.items()}


def drop(condition: Condition, null: Condition, keep: Tensor) -> Condition:
    """Rows where `keep` is False become the null condition's row, exactly; the others stay as they are.

    Training some rows without their condition is what makes one network both the conditional and the unconditional
    model (Ho and Salimans 2022, algorithm 1). A part that `null` does not have is never dropped: an inpainting model
    keeps its mask when it loses its caption. The draw is the caller's: `keep = uniforms >= probability`.

    Args:
        condition: B rows.
        null: the condition that stands for "none", 1 or B rows; cast to the dtype of the kept.
        keep: (B,) bool.

    Raises:
        ValueError: shapes do not fit, or `null` has a part that `condition` lacks.
    """
    if keep.shape != (len(condition),) or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool of shape ({len(condition)},), found {keep.dtype} {tuple(keep.shape)}")
    condition, null = _of_one_length([condition, null])
    kept, others = condition.parts(), null.parts()
    for name, other in others.items():
        if name not in kept:
            raise ValueError(f"the null condition has a {name}, the condition has none")
        part = kept[name]
        if len(other) not in (1, len(part)) or other.shape[1:] != part.shape[1:]:
            raise ValueError(f"null {name} {tuple(other.shape)} does not fit {name} {tuple(part.shape)}")
        rows = keep.to(part.device).view(-1, *[1] * (part.ndim - 1))
        kept[name] = torch.where(rows, part, other.to(part))
    return Condition(**kept)


def _of_one_length(conditions: Sequence[Condition], behind: int = 0) -> list[Condition]:
    """The same with contexts padded to the longest, and with masks, unless all are of one length and without any; the
    places that are added stand before the last `behind`."""
    lengths = {c.context.shape[1] for c in conditions if c.context is not None}
    if len(lengths) < 2 and all(c.mask is None for c in conditions):
        return list(conditions)
    return [_padded(c, max(lengths), behind) for c in conditions]


def _padded(condition: Condition, length: int, behind: int) -> Condition:
    context, mask = condition.context, condition.mask
    if context is None:
        return condition
    if mask is None:
        mask = context.new_ones(context.shape[:2], dtype=torch.bool)
    own, more = context.shape[1] - behind, length - context.shape[1]
    longer = {
        "context": torch.cat([F.pad(context[:, :own], (0, 0, 0, more)), context[:, own:]], dim=1),
        "mask": torch.cat([F.pad(mask[:, :own], (0, more)), mask[:, own:]], dim=1),
    }
    return Condition(**{**condition.parts(), **longer})
