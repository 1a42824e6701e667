"""Whether two models mean the same by a latent: a sample must not be steered by a network of another latent space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec

TOLERANCE = 0.1  # relative; half precision stays far below it, another autoencoder far above


@torch.no_grad()
def latent_probe(codec: Codec) -> tuple[float, ...]:
    """The latent of one fixed picture: the latent space's fingerprint, which survives rounding of the weights."""
    image = _picture(4 * codec.factor)
    if codec.autoencoder is not None:
        image = image.to(next(codec.autoencoder.parameters()).device)
    return tuple(round(value, 5) for value in codec.encode(image).flatten().tolist())


def same_latents(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two probes are those of one latent space."""
    return len(a) == len(b) and math.dist(a, b) <= TOLERANCE * math.hypot(*a)


def _picture(side: int) -> Tensor:
    """(1, 3, side, side): waves of a different direction and length in each colour."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [(row * down + column * across) * (2 * math.pi / side) for down, across in ((1, 0), (1, 1), (2, -1))]
    return torch.stack(waves).sin()[None].float()
