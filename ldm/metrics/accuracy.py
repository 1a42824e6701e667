"""Prompt accuracy: is the nearest of K concept prototypes the concept that was prompted?

A prototype is the mean of the unit features of a concept's real pictures, scaled to unit length again; nearest is by
the largest cosine. (Snell et al. 2017 do so with Euclidean distance; of unit vectors the order is the same.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256  # of the table of all cosines that are held at once: of 50,000 pictures and captions it would be 20 GB


def prototypes(features: Tensor, concepts: Tensor, count: int) -> Tensor:
    """(count, D) of unit length, from unit features (N, D) and the concept 0 <= concepts[i] < count of each, (N,).

    Raises ValueError for a concept without a picture: it has no prototype, and every accuracy would be off.
    """
    seen = torch.bincount(concepts, minlength=count)
    if seen.numel() != count or bool((seen == 0).any()):
        raise ValueError(f"pictures for each concept: {seen.tolist()}; each of the {count} needs one at least")
    sums = torch.zeros(count, features.shape[1], dtype=features.dtype).index_add_(0, concepts, features)
    return F.normalize(sums / seen.unsqueeze(1), dim=1)


def ranks(features: Tensor, concepts: Tensor, prototypes: Tensor) -> Tensor:
    """How many prototypes (K, D) are nearer to each feature (N, D) than that of its own concept (N,): 0 is a hit, (N,).

    A tie counts against the picture, so a constant feature scores 0, not 100 %. Computed in the prototypes' precision.
    """
    found = []
    for part, own in zip(features.split(ROWS), concepts.split(ROWS), strict=True):
        cosines = F.normalize(part.to(prototypes.dtype), dim=1) @ prototypes.T
        found.append((cosines >= cosines.gather(1, own.unsqueeze(1))).sum(dim=1) - 1)
    return torch.cat(found)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % (z = 1.96) when `hits` of `count` were seen (Wilson 1927)."""
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half
