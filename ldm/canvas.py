"""What is drawn of a picture: an area of it, what lies beyond its edges, or the neighbourhood of a small area at full
size. On tensors: image (1, 3, H, W) in [-1, 1], mask (1, 1, H, W) in [0, 1], 1 where to draw.

    canvas = make(image, mask, extend=(0, 16, 0, 0), feather=4)
    drawn = generate.draw(model, requests, plan, helpers, picture=canvas.start(strength, len(requests)))
    images = canvas.finish(drawn)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm import pictures
from ldm.data.transforms import to_tensor
from ldm.errors import UserError
from ldm.ranges import MAX_SIDE
from ldm.start import Picture

Box = tuple[slice, slice]
"""Rows and columns of a picture."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture, which of it is drawn, and in which box: all of it, or the neighbourhood of the mask, at `size`."""

    image: Tensor  # (1, 3, H, W)
    mask: Tensor | None  # (1, 1, H, W)
    box: Box
    size: tuple[int, int]  # height and width that the box is drawn at
    depth: Tensor | None = None  # (1, 1, h, w), of any size: a network's that is told one

    def start(self, strength: float, count: int, window: int | None = None) -> Picture:
        """Where `count` drawings of it begin."""
        image = resized(self.image[..., *self.box], self.size).clamp(-1, 1)
        mask = None if self.mask is None else resized(self.mask[..., *self.box], self.size, "bilinear").clamp(0, 1)
        parts = (image, mask, self.depth)
        image, mask, depth = (None if part is None else part.expand(count, -1, -1, -1) for part in parts)
        assert image is not None
        return Picture(image, strength, mask, depth, window=window)

    def finish(self, drawn: Tensor) -> Tensor:
        """The whole pictures (B, 3, H, W), where (B, 3, h, w) was drawn of the box: their own outside the mask."""
        whole = self.image.expand(len(drawn), -1, -1, -1).clone()
        whole[..., *self.box] = resized(drawn, self.image[..., *self.box].shape[2:]).clamp(-1, 1)
        return whole if self.mask is None else self.mask * whole + (1 - self.mask) * self.image


def make(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    extend: Sequence[int] = (0, 0, 0, 0),
    feather: int = 0,
    only_masked: int | None = None,
    size: tuple[int, int] = (0, 0),
) -> Canvas:
    """The canvas of a picture (1, 3, H, W) and the mask of what to draw of it, if there is one.

    `extend`: pixels that are added at the left, right, top and bottom, which are drawn.
    `feather`: pixels over which the drawn fades in behind the mask's edge.
    `only_masked`: draw only the mask and so many pixels around it, enlarged to `size` (height, width) if that is more.

    Raises UserError for a mask that has nothing to draw, and for numbers that make no sense.
    """
    image, mask = extended(image, mask, extend)
    if mask is not None and not bool((mask > 0).any()):
        raise UserError("the mask is black everywhere, so there is nothing to draw; make white what is to be drawn")
    if mask is None and (feather or only_masked is not None):
        raise UserError("there is no mask to feather or to draw the neighbourhood of; give one")
    box, drawn = (slice(0, image.shape[2]), slice(0, image.shape[3])), (image.shape[2], image.shape[3])
    if mask is not None and only_masked is not None:
        box, drawn = neighbourhood(mask, only_masked, size)
    return Canvas(image, None if mask is None else feathered(mask, feather), box, drawn)


def extended(image: Tensor, mask: Tensor | None, sides: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Image and mask with so many pixels more at the left, right, top and bottom: the picture's reflection, to draw.

    Raises UserError for anything but four numbers from 0 on, and for a picture that would be too large.
    """
    if len(sides) != 4 or min(sides) < 0:
        raise UserError(f"extend is {tuple(sides)}; give pixels for left, right, top and bottom, as 0,16,0,0")
    left, right, top, bottom = sides
    height, width = image.shape[2] + top + bottom, image.shape[3] + left + right
    if max(height, width) > MAX_SIDE or height * width > pictures.MAX_PIXELS:
        raise UserError(f"the extended picture would be {width} x {height} pixels; extend it less")
    if not any(sides):
        return image, mask
    beyond = ((0, 0), (0, 0), (top, bottom), (left, right))
    mask = torch.zeros_like(image[:, :1]) if mask is None else mask
    image = torch.from_numpy(np.pad(image.numpy(), beyond, mode="symmetric"))  # torch's reaches one picture's width
    return image, F.pad(mask, (left, right, top, bottom), value=1.0)


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask (B, 1, H, W) that rises from its edge over so many pixels, to the inside: what is 0 stays 0.

    The mean of the mask worn away by 0 to `pixels` pixels; the picture's own edge is none. Raises UserError below 0.
    """
    if pixels < 0:
        raise UserError(f"feather is {pixels} pixels; choose 0 (a sharp edge) or more")
    worn, total = mask, mask.clone()
    for done in range(pixels):
        before, worn = worn, -F.max_pool2d(-worn, 3, stride=1, padding=1)
        if torch.equal(worn, before):  # nothing is left to wear away
            total += (pixels - done) * worn
            break
        total += worn
    return total / (pixels + 1)


def neighbourhood(mask: Tensor, padding: int, size: tuple[int, int]) -> tuple[Box, tuple[int, int]]:
    """The box around what is not 0 in a mask (1, 1, H, W) with `padding` pixels, and the size to draw it at.

    It has the proportions of `size` (height, width) where the picture has room for them, and is enlarged to fit into
    `size`, never made smaller. Raises UserError for a padding below 0.
    """
    if padding < 0:
        raise UserError(f"only_masked is {padding} pixels; choose 0 (the mask alone) or more")
    (height, width), (tall, wide) = mask.shape[2:], size
    rows, columns = (mask[0, 0] > 0).nonzero(as_tuple=True)
    top, bottom = _padded(int(rows.min()), int(rows.max()) + 1, padding, height)
    left, right = _padded(int(columns.min()), int(columns.max()) + 1, padding, width)
    top, bottom = _widened(top, bottom, round((right - left) * tall / wide), height)
    left, right = _widened(left, right, round((bottom - top) * wide / tall), width)
    scale = max(1.0, min(tall / (bottom - top), wide / (right - left)))
    return (slice(top, bottom), slice(left, right)), (round((bottom - top) * scale), round((right - left) * scale))


def resized(plane: Tensor, size: Sequence[int], how: str = "bicubic") -> Tensor:
    """(B, C, H, W) at `size` (height, width), antialiased; values may overshoot. Itself if it has that size."""
    if tuple(plane.shape[2:]) == tuple(size):
        return plane
    return F.interpolate(plane, size=list(size), mode=how, antialias=True, align_corners=False)


def cut_out(picture: Image.Image) -> tuple[Tensor, Tensor | None]:
    """An upright picture in 8 bits -> image, and as the mask what is transparent of it; None if nothing is.

    Half transparent pixels keep their own colour, which the mask mixes; what is not to be seen at all is white.
    """
    if picture.has_transparency_data:
        levels = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1)[None]
        alpha = levels[:, 3:].float() / 255
        if bool((alpha < 1).any()):
            colours = levels[:, :3].float() / 127.5 - 1
            return torch.where(alpha > 0, colours, torch.ones(())), 1 - alpha
    return to_tensor(pictures.rgb(picture))[None], None


def _padded(start: int, stop: int, padding: int, length: int) -> tuple[int, int]:
    return max(0, start - padding), min(length, stop + padding)


def _widened(start: int, stop: int, wanted: int, length: int) -> tuple[int, int]:
    """The span about its middle, `wanted` long if it is shorter, moved so that it lies within `length`."""
    if stop - start >= wanted:
        return start, stop
    wanted = min(wanted, length)
    start = min(max(0, (start + stop - wanted) // 2), length - wanted)
    return start, start + wanted
