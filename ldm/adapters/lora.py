"""LoRA and its kin: changes of a model's weights, merged into new networks, so that drawing costs nothing more.

The networks that they are merged into stay as they are: the new ones have new tensors where something changes, and
share all others with the old.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.adapters.changes import Change
from ldm.backends.packed import dense
from ldm.errors import UserError


@dataclass(frozen=True)
class Rows:
    """What a change applies to: the parameter `name`, or (of one that joins several) the `piece`-th of its `pieces`.

    open_clip keeps query, key and value of an attention in one matrix, and the change is to each.
    """

    name: str
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True, eq=False)
class Lora:
    """The changes to a model's networks: "unet" and "text" -> where -> change. `source` names it in errors."""

    changes: Mapping[str, Mapping[Rows, Change]]
    source: str = "the LoRA"


@torch.no_grad()
def merged(networks: Mapping[str, nn.Module], loras: Sequence[tuple[Lora, float]]) -> dict[str, nn.Module]:
    """`networks` ("unet", "text" -> module) with the changes of `loras`, each times its scale; several add up.

    A network that nothing changes is itself. Raises UserError for a change that does not fit, or a scale that is not
    finite.
    """
    parameters = {part: dict(module.named_parameters()) for part, module in networks.items()}
    found: dict[tuple[str, str], list[tuple[Rows, Change, float]]] = {}
    for lora, scale in loras:
        if not math.isfinite(scale):
            raise UserError(f"the scale of {lora.source} is {scale}; choose a finite number, such as 0.8")
        for part, changes in lora.changes.items():
            for rows, change in changes.items():
                _check(lora, parameters, part, rows, change)
                found.setdefault((part, rows.name), []).append((rows, change, scale))
    values: dict[str, dict[str, Tensor]] = {}
    for (part, name), changes in found.items():
        values.setdefault(part, {})[name] = _changed(dense(parameters[part][name]), changes)
    return {part: sharing(module, values[part]) if part in values else module for part, module in networks.items()}


def sharing(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module like `module` with `values` in place of these parameters, and its very tensors for all others."""
    kept = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, kept)  # what is in its memo is not copied
    for name, value in values.items():
        place, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(place), leaf, nn.Parameter(value, requires_grad=False))
    return made


def _changed(original: Tensor, changes: Sequence[tuple[Rows, Change, float]]) -> Tensor:
    """Summed in float32 or better; each change is of the weight as it was, so their order does not matter."""
    value = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
    for rows, change, scale in changes:
        piece = value.chunk(rows.pieces)[rows.piece]
        piece += scale * change.of(original.chunk(rows.pieces)[rows.piece])
    return value.to(original.dtype)


def _check(lora: Lora, parameters: Mapping[str, Mapping[str, Tensor]], part: str, rows: Rows, change: Change) -> None:
    weight = parameters.get(part, {}).get(rows.name)
    if weight is None:
        raise UserError(f"{lora.source} changes {rows.name} of the {part}, which this model does not have")
    shape = (weight.shape[0] // rows.pieces, *weight.shape[1:])
    if not change.fits(shape):
        raise UserError(
            f"{lora.source} was made for another architecture: its change to {rows.name} of the {part} does not fit "
            f"that weight, which is {' x '.join(map(str, shape))}"
        )
