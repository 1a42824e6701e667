"""Bits per dimension, which mean nothing without the space that the dimensions belong to.

pixels   how many bits an 8-bit value of the picture takes. A model of pixels in [-1, 1] has a density there; one
         8-bit level is 2 / 255 wide there, so a density's bits are -log2 p + log2(127.5). For data that were
         dequantised (each level spread uniformly over its width) this bounds the bits of the levels from above
         (Theis et al. 2016).
latent   -log2 of the density of the autoencoder's latents, in the codec's units. Less than 0 is nothing unusual,
         and figures of different autoencoders have nothing to do with each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec

HALF_LEVELS = 127.5  # 8-bit levels in a unit of the range [-1, 1]


@dataclass(frozen=True, eq=False)
class Space:
    """Whose density is measured. The model sees x = (value - shift) * scale of a value of the space.

    `name`: pixels (values in [-1, 1]) or latent; `shift`, `scale`: () or (C, 1, 1), float64.
    """

    name: str
    shift: Tensor
    scale: Tensor

    @property
    def offset(self) -> float:
        """What is added to -log2 p(x) per dimension."""
        return math.log2(HALF_LEVELS) - float(self.scale.log2().mean()) if self.name == "pixels" else 0.0


LATENT = Space("latent", torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
PIXELS = Space("pixels", torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))


def space_of(codec: Codec) -> Space:
    """Pixels for the identity codec, whose shift and scale are undone; latent for an autoencoder's."""
    if codec.autoencoder is not None:
        return LATENT
    shift, scale = (
        torch.tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (codec.config.shift, codec.config.scale)
    )
    return Space("pixels", shift, scale)


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """`value` (B,) float64, one for each picture. Printed, it names its space."""

    value: Tensor
    space: str

    @property
    def mean(self) -> float:
        return float(self.value.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean over pictures; nan for a single one."""
        return float(self.value.std() / math.sqrt(len(self.value))) if len(self.value) > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.4f} bits/dim[{self.space}]"


def density_bits(log_density: Tensor, dimensions: int, space: Space = LATENT) -> BitsPerDim:
    """Of ln p(x) (B,), the density of the model's own x of so many dimensions."""
    return BitsPerDim(-log_density.double().cpu() / (dimensions * math.log(2)) + space.offset, space.name)
