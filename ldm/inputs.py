"""What a caller may give for pictures and masks -> tensors: image (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) in [0, 1].

What is plainly meant is taken; what could mean two things, or nothing, is a UserError that says what is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import pictures
from ldm.data.transforms import to_tensor
from ldm.errors import UserError

Picture = Tensor | np.ndarray | Image.Image | str | Path
ROUNDING = 1e-3  # how far beyond its range a value may be, by rounding in half precision

_WANTED = (
    "give the path of a PNG, JPEG or WebP, a Pillow picture, an array (H, W, 3) of uint8, or a tensor (3, H, W) or "
    "(B, 3, H, W) in [-1, 1]"
)


def as_images(given: Picture | Sequence[Picture]) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1], of one or a sequence of:

    a path or a picture of Pillow's, of any mode and orientation; an array (H, W, 3) or (B, H, W, 3) of uint8; a tensor
    (3, H, W) or (B, 3, H, W) of uint8, or of floats in [-1, 1]. Raises UserError.
    """
    if isinstance(given, list | tuple):
        return _joined([as_images(one) for one in given], "pictures")
    if isinstance(given, Image.Image | str | os.PathLike):
        return to_tensor(pictures.rgb(pictures.read(given)))[None]
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim not in (3, 4) or given.shape[-1] != 3:
            raise UserError(f"the picture is an array {given.shape} of {given.dtype}; {_WANTED}")
        given = torch.from_numpy(np.array(given)).movedim(-1, -3)
    if not isinstance(given, Tensor):
        raise UserError(f"the picture is of the type {type(given).__name__}; {_WANTED}")
    image = given.detach()
    if image.dtype == torch.uint8:
        image = image / 127.5 - 1
    if image.ndim == 3:
        image = image[None]
    check_images(image)
    return image.float()


def as_masks(given: Picture | Sequence[Picture], image: Tensor) -> Tensor:
    """Masks (B, 1, H, W), float32 in [0, 1], for the pictures `image`: one for each, or one for all. They may be

    paths or pictures of Pillow's, black where the picture stays and white where it is drawn anew; arrays or tensors
    (H, W), (B, H, W), (B, 1, H, W) of booleans, of numbers in [0, 1], or of uint8, where 255 is 1 (and 1, if none
    is larger). Raises UserError.
    """
    mask = _for_each(_planes(given, "mask"), len(image))
    check_masks(mask, image)
    return mask.float()


def as_depths(given: Picture | Sequence[Picture], count: int) -> Tensor:
    """Depth maps (B, 1, H, W), float32 of any size and scale, larger is nearer, for `count` pictures: one for each, or
    one for all, in the forms of masks. Raises UserError."""
    depth = _for_each(_planes(given, "depth map"), count)
    check_depths(depth, count)
    return depth.float()


def check_images(image: Tensor) -> None:
    """Raise UserError for what is no batch of pictures (B, 3, H, W) of floats in [-1, 1]."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        hint = {1: " (grey)", 4: " (alpha?)"}.get(image.shape[1] if image.ndim == 4 else 0, "")
        raise UserError(f"the picture is a tensor {tuple(image.shape)}{hint}; {_WANTED}")
    if not image.is_floating_point():
        raise UserError(f"the picture is a tensor of {image.dtype}; give uint8 from 0 to 255 or floats in [-1, 1]")
    if not bool(image.isfinite().all()):
        raise UserError("the picture has values that are not finite; look at how it was made")
    low, high = float(image.min()), float(image.max())
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise UserError(
            f"the picture has values from {low:g} to {high:g}; floats are in [-1, 1] (x / 127.5 - 1, where x is 0 to "
            "255), and uint8 from 0 to 255"
        )


def check_masks(mask: Tensor, image: Tensor) -> None:
    """Raise UserError for what is no mask (B, 1, H, W) of floats in [0, 1] for `image` (B, 3, H, W)."""
    wanted = (len(image), 1, *image.shape[2:])
    if mask.shape != wanted:
        raise UserError(f"the mask is {tuple(mask.shape)} and the picture asks for {wanted}; make it fit")
    if not mask.is_floating_point() or not bool(mask.isfinite().all()):
        raise UserError("the mask has values that are no finite numbers; give floats in [0, 1], 1 where to draw anew")
    low, high = float(mask.min()), float(mask.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise UserError(
            f"the mask has values from {low:g} to {high:g}; floats are in [0, 1], 1 where to draw anew, and uint8 from "
            "0 to 255"
        )


def check_depths(depth: Tensor, count: int) -> None:
    """Raise UserError for what is no depth map (B, 1, H, W) of floats for each of `count` pictures."""
    if depth.ndim != 4 or depth.shape[:2] != (count, 1) or 0 in depth.shape:
        raise UserError(f"the depth map is {tuple(depth.shape)}; give ({count}, 1, H, W) for {count} pictures")
    if not depth.is_floating_point() or not bool(depth.isfinite().all()):
        raise UserError("the depth map has values that are no finite numbers; look at how it was made")


def _planes(given: Picture | Sequence[Picture], what: str) -> Tensor:
    """Pictures of one channel (B, 1, H, W): booleans, uint8 and files in [0, 1], other numbers as they are."""
    if isinstance(given, list | tuple):
        return _joined([_planes(one, what) for one in given], f"{what}s")
    if isinstance(given, Image.Image | str | os.PathLike):
        return _grey(pictures.read(given), what)
    if not isinstance(given, np.ndarray | Tensor):
        raise UserError(f"the {what} is of the type {type(given).__name__}; give a picture, an array or a tensor")
    try:
        plane = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    except TypeError as error:
        raise UserError(f"the {what} is an array of {given.dtype}; give booleans, uint8 or floats") from error
    if plane.dtype == torch.uint8 and plane.numel() and plane.max() > 1:
        plane = plane / 255
    if plane.ndim == 3 and plane.shape[-1] == 1 and isinstance(given, np.ndarray):
        plane = plane.movedim(-1, 0)
    plane = plane[None, None] if plane.ndim == 2 else plane[:, None] if plane.ndim == 3 else plane
    return plane if plane.is_floating_point() or plane.is_complex() else plane.float()


def _for_each(plane: Tensor, count: int) -> Tensor:
    return plane.expand(count, *plane.shape[1:]) if plane.ndim == 4 and len(plane) == 1 else plane


def _grey(picture: Image.Image, what: str) -> Tensor:
    """An upright picture in 8 bits -> (1, 1, H, W) in [0, 1]."""
    if picture.has_transparency_data:
        alpha = picture if picture.getbands()[-1] in ("A", "a") else picture.convert("RGBA")
        if alpha.getextrema()[-1][0] < 255:  # type: ignore[index] (of several bands)
            raise UserError(f"the {what} has transparent parts; save it in black and white")
    return torch.from_numpy(np.array(pictures.rgb(picture).convert("L")) / np.float32(255))[None, None]


def _joined(parts: Sequence[Tensor], what: str) -> Tensor:
    """The batches in one. Raises UserError for none, and for several sizes."""
    if not parts:
        raise UserError(f"an empty list of {what} was given; give at least one")
    sizes = sorted({f"{part.shape[3]} x {part.shape[2]}" for part in parts})
    if len(sizes) > 1:
        raise UserError(f"the {what} are of different sizes ({', '.join(sizes)}); bring them to one")
    return torch.cat(list(parts))
