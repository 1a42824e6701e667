"""LoRA (Hu et al. 2021): a weight W (out, in) becomes W + scale (alpha / r) up @ down, with up (out, r), down (r, in).

Here it is merged into the weights, so that drawing costs nothing more; several add up. The weights as they were are
kept, by reference, and put back when the last change goes: what is unmerged is the model's own tensor again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import UserError


@dataclass(frozen=True)
class Rows:
    """What a change applies to: the weight `name`, or (of one that joins several) its `piece` of `pieces` equal parts.

    open_clip keeps query, key and value of an attention in one matrix, and the change is to each.
    """

    name: str
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True)
class Factors:
    """down (r, in) or (r, in, kh, kw); up (out, r) or (out, r, 1, 1); alpha: r makes the change up @ down itself."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """(out, in * kh * kw), float32: the change at scale 1."""
        return (self.alpha / self.rank) * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True, eq=False)
class Lora:
    """The changes to a model's networks: "unet" and "text" -> where -> factors. `source` names it in errors."""

    changes: Mapping[str, Mapping[Rows, Factors]]
    source: str = "the LoRA"


class Loras:
    """Which LoRAs are merged into `networks` ("unet", "text" -> module), and with what scale."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        self.parameters = {part: dict(module.named_parameters()) for part, module in networks.items()}
        self.merged: list[tuple[Lora, float]] = []
        self._originals: dict[tuple[str, str], Tensor] = {}

    def add(self, lora: Lora, scale: float = 1.0) -> None:
        """Merge `lora` on top of what is merged already; raises UserError, changing nothing, if it does not fit."""
        if not math.isfinite(scale):
            raise UserError(f"the scale of {lora.source} is {scale}; choose a finite number, such as 0.8")
        for part, changes in lora.changes.items():
            for rows, factors in changes.items():
                self._check(lora, part, rows, factors)
        self.merged.append((lora, scale))
        self._apply(lora)

    def remove(self, lora: Lora) -> None:
        """Unmerge `lora`; the others stay. Raises ValueError if it is not merged."""
        places = [i for i, (merged, _) in enumerate(self.merged) if merged is lora]
        if not places:
            raise ValueError(f"{lora.source} is not merged")
        del self.merged[places[-1]]
        self._apply(lora)

    def clear(self) -> None:
        """Unmerge all: every weight is the tensor that it was."""
        while self.merged:
            self.remove(self.merged[-1][0])

    @torch.no_grad()
    def _apply(self, changed: Lora) -> None:
        """Compute the weights that `changed` touches anew, from the originals and all that is merged."""
        touched = {(part, rows.name) for part, changes in changed.changes.items() for rows in changes}
        for part, name in touched:
            parameter = self.parameters[part][name]
            original = self._originals.setdefault((part, name), parameter.data)
            value = None
            for lora, scale in self.merged:
                for rows, factors in lora.changes.get(part, {}).items():
                    if rows.name == name:
                        value = original.to(torch.float32, copy=True) if value is None else value
                        piece = value.chunk(rows.pieces)[rows.piece]
                        piece += scale * factors.product().to(value.device).reshape(piece.shape)
            if value is None:
                parameter.data = self._originals.pop((part, name))
            else:
                parameter.data = value.to(original.dtype)

    def _check(self, lora: Lora, part: str, rows: Rows, factors: Factors) -> None:
        if rows.name not in self.parameters.get(part, {}):
            raise UserError(f"{lora.source} changes {rows.name} of the {part}, which this model does not have")
        out, *rest = self.parameters[part][rows.name].shape
        expected = (out // rows.pieces, math.prod(rest))
        given = (factors.up.shape[0], factors.down[0].numel() if factors.rank else 0)
        inner = (factors.up[0].numel() if len(factors.up) else 0, factors.rank)
        if given != expected or inner[0] != inner[1]:
            raise UserError(
                f"{lora.source} was made for another architecture: its change to {rows.name} of the {part} is "
                f"{tuple(factors.up.shape)} x {tuple(factors.down.shape)} and the weight {expected}"
            )
