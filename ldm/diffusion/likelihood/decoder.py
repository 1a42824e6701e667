"""The last step of the chain, p(x0 | x at the smallest level) = N(mean, variance): how likely the data themselves are.

As a density, or for 8-bit pixels as the mass that the Gaussian puts on the pixel's own level (Ho et al. 2020,
equation 13), with the two outermost levels open to infinity so that all masses sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.likelihood.bits import Space

HALF_WIDTH = 1 / 255  # of an 8-bit level in [-1, 1]


def density_nats(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-ln of the Gaussian density, value by value, in x0's coordinates."""
    return 0.5 * ((x0 - mean).square() / variance + (2 * math.pi * variance).log())


def level_nats(pixel: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-ln of the mass of each 8-bit level: `pixel` is 2 k / 255 - 1 with k = 0 .. 255, and so are mean and variance.

    The mass between a and b is taken on the side of the mean where both are far from 1, from their logarithms: a level
    20 deviations off keeps its 200 nats, where a difference of probabilities is 0.
    """
    deviation = variance.sqrt()
    below, above = (pixel - HALF_WIDTH - mean) / deviation, (pixel + HALF_WIDTH - mean) / deviation
    below = torch.where(pixel < -1 + HALF_WIDTH, -torch.inf, below)
    above = torch.where(pixel > 1 - HALF_WIDTH, torch.inf, above)
    flip = below + above > 0
    below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
    far, near = torch.special.log_ndtr(below), torch.special.log_ndtr(above)
    return -(near + torch.log1p(-(far - near).exp()))


def pixel_level_nats(x0: Tensor, mean: Tensor, variance: Tensor, space: Space) -> Tensor:
    """`level_nats` of the model's own x = (pixel - shift) * scale."""
    shift, scale = space.shift.to(x0), space.scale.to(x0)
    return level_nats(x0 / scale + shift, mean / scale + shift, variance / scale**2)
