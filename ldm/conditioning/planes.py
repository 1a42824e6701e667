"""Planes that a network is given beside the noisy latent: mask and masked picture, or depth; (B, C, h, w)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.autoencoder.codec import Codec


def kind_of_planes(extra: int, latent_channels: int) -> str:
    """What a network's channels beside the latent's are, "mask", "depth" or neither, by their number: nothing tells
    an inpainting network from a depth network."""
    return {1 + latent_channels: "mask", 1: "depth"}.get(extra, "")


def inpainting_planes(codec: Codec, image: Tensor, mask: Tensor) -> Tensor:
    """(B, 1 + C, h, w): the mask, and the latent of the picture without what lies under it, as Stable Diffusion has it.

    `image` (B, 3, H, W) in [-1, 1]; `mask` (B, 1, H, W), from 0.5 on 1: draw here. What is masked is grey (0).
    """
    hidden = (mask >= 0.5).to(image)
    latent = codec.encode(image * (1 - hidden))
    return torch.cat([F.interpolate(hidden, size=latent.shape[-2:], mode="nearest").to(latent), latent], dim=1)


def depth_plane(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W), of any scale, larger is nearer -> (B, 1, h, w): each picture's spans [-1, 1]; flat ones are -1."""
    depth = F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low).clamp(min=1e-8) - 1
