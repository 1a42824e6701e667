"""Classifier-free dropout, the one place: some rows of a batch are trained on the null condition."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ldm.conditioning.record import Conditioning


def drop(conditioning: Conditioning, null: Conditioning, keep_mask: Tensor) -> Conditioning:
    """Rows where `keep_mask` is False become the null condition's row, exactly; the others stay as they are.

    Training some rows without their condition is what makes one network both the conditional and the unconditional
    model (Ho and Salimans 2022, algorithm 1). `null` has one row or B rows. A part it does not have is never
    dropped: an inpainting model keeps its mask when it loses its caption. The draw is the caller's:
    `keep_mask = uniforms >= probability`.

    Args:
        conditioning: B rows.
        null: the condition that stands for "none", 1 or B rows, in the same L, D, V; cast to the dtype of the kept.
        keep_mask: (B,) bool.

    Raises:
        ValueError: shapes do not fit, or `null` has a part that `conditioning` lacks.
    """
    if keep_mask.shape != (len(conditioning),) or keep_mask.dtype != torch.bool:
        found = f"{keep_mask.dtype} {tuple(keep_mask.shape)}"
        raise ValueError(f"keep_mask must be bool of shape ({len(conditioning)},), found {found}")
    mixed: dict[str, Tensor | None] = {}
    for name in (f.name for f in fields(Conditioning)):
        mixed[name] = _mix(getattr(conditioning, name), getattr(null, name), keep_mask, name)
    return Conditioning(**mixed)


def _mix(kept: Tensor | None, null: Tensor | None, keep_mask: Tensor, name: str) -> Tensor | None:
    if null is None:
        return kept
    if kept is None:
        raise ValueError(f"the null condition has a {name}, the conditioning has none")
    if len(null) not in (1, len(kept)) or null.shape[1:] != kept.shape[1:]:
        raise ValueError(f"null {name} {tuple(null.shape)} does not fit {name} {tuple(kept.shape)}")
    mask = keep_mask.to(kept.device).view(-1, *[1] * (kept.ndim - 1))
    return torch.where(mask, kept, null.to(kept))
