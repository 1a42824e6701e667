"""Noise between that of two seeds, along the sphere on which unit normals lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.jobs import Request
from ldm.sampling.noise import Draws, NoiseStream

PARALLEL = 1e-4  # radians; below, the arc is its chord


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """From `a` (share 0) to `b` (share 1), both (B, ...), along the arc between each row's two directions (Shoemake
    1985). `share`: a number, or (B,). Unit normals stay unit normals, which their mean would not."""
    share = torch.as_tensor(share, dtype=torch.float64, device=a.device).reshape(-1, *[1] * (a.ndim - 1))
    rows_a, rows_b = (x.double().flatten(1) for x in (a, b))
    cosine = F.cosine_similarity(rows_a, rows_b, eps=1e-30).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (a.ndim - 1))
    flat = (angle < PARALLEL) | (angle > torch.pi - PARALLEL)
    safe = torch.where(flat, 1.0, angle)
    of_a = torch.where(flat, 1 - share, ((1 - share) * safe).sin() / safe.sin())
    of_b = torch.where(flat, share, (share * safe).sin() / safe.sin())
    return (of_a * a.double() + of_b * b.double()).to(a.dtype)


@dataclass(frozen=True, eq=False)
class Varied:
    """`noise`, but that the start's lies so far towards another seed's as the requests say."""

    noise: Draws
    first: Tensor

    def initial(self) -> Tensor:
        return self.first.clone()

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.noise(sigma, sigma_next)


def varied(noise: Draws, requests: Sequence[Request]) -> Draws:
    """`noise`, whose rows are the requests', with the starts that they give and their variations; itself without any.

    Raises UserError for a start of another shape, or not finite.
    """
    if all(request.variation is None and request.noise is None for request in requests):
        return noise
    first = noise.initial()
    for i, request in enumerate(requests):
        if request.noise is None:
            continue
        if request.noise.shape != first[i].shape or not bool(request.noise.isfinite().all()):
            raise UserError(
                f"noise of {tuple(request.noise.shape)} was given for a latent of {tuple(first[i].shape)}, or it is "
                "not finite; give unit normals (B, C, h, w), one for each picture"
            )
        first[i] = request.noise
    if all(request.variation is None for request in requests):
        return Varied(noise, first)
    pairs = [request.variation or (request.seed, 0.0) for request in requests]
    shape = (first.shape[1], first.shape[2], first.shape[3])
    others = NoiseStream([seed for seed, _ in pairs], shape, first.device, first.dtype).initial()
    shares = torch.tensor([share for _, share in pairs])
    return Varied(noise, slerp(first.cpu(), others.cpu(), shares).to(first.device))  # Apple's GPUs have no float64
