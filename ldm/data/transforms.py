"""Picture -> float32 tensor in [-1, 1]: square crop, resize, flip. Random choices come from the caller's rng."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import UserError

CROPS = ("center", "random")


def prepare(picture: Image.Image, size: int, crop: str, flip: bool, rng: random.Random) -> Tensor:
    """RGB picture -> (3, size, size) float32 in [-1, 1].

    The largest square (in the middle, or at a random place along the longer side) is resized with an antialiased
    bicubic filter; that is the shorter side resized to `size` and then cropped, without making the rest of an
    extremely long picture. With `flip`, half of the pictures are mirrored. Two numbers are drawn whatever is asked.
    """
    place, mirror = rng.random(), rng.random()
    picture = square(picture, size, place if crop == "random" else 0.5)
    if flip and mirror < 0.5:
        picture = ImageOps.mirror(picture)
    return to_tensor(picture)


def square(picture: Image.Image, size: int, place: float = 0.5) -> Image.Image:
    """The square of side min(width, height) at `place` in [0, 1] along the longer side, resized to `size` pixels."""
    side = min(picture.size)
    left = int((picture.width - side) * place)
    top = int((picture.height - side) * place)
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]; 0 becomes -1, 255 becomes 1."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def check(size: int, crop: str) -> None:
    """Raises UserError for a picture size below 1 and an unknown crop."""
    if size < 1:
        raise UserError(f"data.size is {size}; it must be at least 1 pixel")
    if crop not in CROPS:
        raise UserError(f"data.crop is '{crop}'; it must be one of {', '.join(CROPS)}")
