"""A large picture in overlapping tiles whose seams are feathered: weights of all tiles sum to one everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def feather(length: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """Tiles along one axis: (start, weights (min(tile, length),)), 0 <= overlap < tile.

    Each tile but the last starts `tile - overlap` after the one before; the last ends at `length`. Weights rise
    linearly over the overlap from a tile's edge, and sum to one over the tiles at each position.
    """
    if tile >= length:
        return [(0, torch.ones(length))]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    inside = torch.arange(tile, dtype=torch.float32)
    ramp = torch.minimum(inside + 1, tile - inside).clamp(max=overlap + 1)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + tile] += ramp
    return [(start, ramp / total[start : start + tile]) for start in starts]


def map_tiles(
    work: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, shrink: int = 1, grow: int = 1
) -> Tensor:
    """`work` on each tile of x (B, C, H, W), blended: (B, C', H * grow / shrink, W * grow / shrink).

    `tile` and `overlap` are in x's pixels, multiples of `shrink` like H and W; `work` turns (B, C, th, tw) into
    (B, C', th * grow / shrink, tw * grow / shrink).
    """
    height, width = (side // shrink * grow for side in x.shape[-2:])
    rows, columns = (feather(side, tile // shrink * grow, overlap // shrink * grow) for side in (height, width))
    out: Tensor | None = None
    for top, weight_y in rows:
        for left, weight_x in columns:
            source = (length // grow * shrink for length in (top, left, len(weight_y), len(weight_x)))
            piece = work(_cut(x, *source))
            if out is None:
                out = piece.new_zeros((*piece.shape[:2], height, width))
            target = _cut(out, top, left, len(weight_y), len(weight_x))
            target += piece * weight_y.to(piece)[:, None] * weight_x.to(piece)[None, :]
    assert out is not None
    return out


def _cut(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return x[..., top : top + height, left : left + width]
