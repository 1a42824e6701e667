"""Picture -> float32 tensor in [-1, 1]: crop, resize, flip. Random choices come from the caller's rng."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import UserError

CROPS = ("center", "random")


@dataclass(frozen=True)
class Prepared:
    """`image` float32 (3, H, W) in [-1, 1]; `size` height and width of the picture it was made of; `crop` top and left
    of what is seen of it, in pixels after the resize (and the mirroring)."""

    image: Tensor
    size: tuple[int, int]
    crop: tuple[int, int]
    crop_other_way: tuple[int, int]  # of the same part in the mirror image
    depth: Tensor  # float32 (1, H, W) in [-1, 1], the same part of the depth map; (0, H, W) where there is none


def prepare(
    picture: Image.Image,
    size: int | tuple[int, int],
    crop: str,
    flip: bool,
    rng: random.Random,
    depth: Image.Image | None = None,
) -> Prepared:
    """RGB picture -> one of `size` (height, width), or of size x size pixels; so its `depth`, grey and of any size.

    The largest part of that shape (in the middle, or at a random place along the side that has too much) is resized
    with an antialiased bicubic filter; that is the picture resized until it covers `size` and then cropped, without
    making the rest of an extremely long one. With `flip`, half of the pictures are mirrored. Two numbers are drawn
    whatever is asked.
    """
    height, width = (size, size) if isinstance(size, int) else size
    place, mirror = rng.random(), rng.random()
    original = picture.height, picture.width
    left, top, right, bottom = _part(picture.size, height, width, place if crop == "random" else 0.5)
    scale = height / (bottom - top)
    corner = round(top * scale), round(left * scale)
    other = corner[0], round((original[1] - right) * scale)
    made = [picture] if depth is None else [picture, depth.resize(picture.size, Image.Resampling.BICUBIC)]
    made = [_cut(each, height, width, (left, top, right, bottom)) for each in made]
    if flip and mirror < 0.5:
        made = [ImageOps.mirror(each) for each in made]
        corner, other = other, corner
    planes = to_tensor(made[1]) if depth is not None else torch.empty(0, height, width)
    return Prepared(to_tensor(made[0]), original, corner, other, planes)


def square(picture: Image.Image, size: int, place: float = 0.5) -> Image.Image:
    """The square of side min(width, height) at `place` in [0, 1] along the longer side, resized to `size` pixels."""
    return _cut(picture, size, size, _part(picture.size, size, size, place))


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _part(picture: tuple[int, int], height: int, width: int, place: float) -> Box:
    """The largest box of the shape height x width in a picture of this width and height."""
    across = min(picture[0], picture[1] * width / height)
    down = min(picture[1], picture[0] * height / width)
    left, top = int((picture[0] - across) * place), int((picture[1] - down) * place)
    return left, top, min(left + across, picture[0]), min(top + down, picture[1])


def _cut(picture: Image.Image, height: int, width: int, box: Box) -> Image.Image:
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1], a grey one (1, H, W); 0 becomes -1, 255 becomes 1."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).reshape(picture.height, picture.width, -1)
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def check(size: int, crop: str) -> None:
    """Raises UserError for a picture size below 1 and an unknown crop."""
    if size < 1:
        raise UserError(f"data.size is {size}; it must be at least 1 pixel")
    if crop not in CROPS:
        raise UserError(f"data.crop is '{crop}'; it must be one of {', '.join(CROPS)}")
