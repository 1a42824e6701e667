"""Changes to training pictures after which a person still names the same thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """How far a training picture is moved. Few pictures of a concept exist, so the changes are large."""

    rotation: float = 20.0  # degrees, either way
    scale: float = 0.25  # zoom by exp of up to this, either way
    shift: float = 0.12  # of the side, either way
    brightness: float = 0.2  # of the range, either way
    contrast: float = 0.4  # contrast and saturation by exp of up to this, either way
    hue: float = 25.0  # degrees, either way; colour names are part of concepts ("blue heart"), so not far
    blur: float = 0.5  # share of pictures that lose detail, as a decoder's pictures do


def augment(image: Tensor, rng: torch.Generator, settings: Augmentation) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], each mirrored, moved, recoloured and blurred by draws of `rng`.

    What comes into view is the colour of the picture's border.
    """
    count = image.shape[0]

    def spread(width: float, shape: tuple[int, ...] = (count,)) -> Tensor:
        return (torch.rand(shape, generator=rng) * 2 - 1) * width

    def coin(share: float) -> Tensor:
        return torch.rand(count, generator=rng) < share

    angle, zoom = spread(math.radians(settings.rotation)), torch.exp(spread(settings.scale))
    mirror = torch.where(coin(0.5), -1.0, 1.0)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    matrix = rotation / zoom.view(-1, 1, 1) * torch.stack([mirror, torch.ones(count)], dim=1).view(-1, 1, 2)
    # The grid's coordinates run from -1 to 1, so a shift by a share of the side is twice that.
    theta = torch.cat([matrix, spread(2 * settings.shift, (count, 2, 1))], dim=2)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)

    colours = colour_matrices(spread(math.radians(settings.hue)), torch.exp(spread(settings.contrast)))
    image = torch.einsum("bij,bjhw->bihw", colours, image)
    gain = torch.exp(spread(settings.contrast)).view(-1, 1, 1, 1)
    image = image * gain + spread(2 * settings.brightness).view(-1, 1, 1, 1)

    height, width = image.shape[-2:]
    coarse = F.interpolate(F.avg_pool2d(image, 2), (height, width), mode="bilinear", align_corners=False)
    image = torch.where(coin(settings.blur).view(-1, 1, 1, 1), torch.lerp(image, coarse, 0.7), image)
    return image.clamp(-1, 1)


def colour_matrices(hue: Tensor, saturation: Tensor) -> Tensor:
    """(B, 3, 3): rotate each colour about the gray axis by `hue` radians and stretch its distance from it."""
    axis = torch.full((3,), 1 / math.sqrt(3))
    along = torch.outer(axis, axis)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = (rearrange(f(hue), "b -> b 1 1") for f in (torch.cos, torch.sin))
    across = cos * (torch.eye(3) - along) + sin * cross
    return along + rearrange(saturation, "b -> b 1 1") * across
