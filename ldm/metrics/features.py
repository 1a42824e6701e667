"""Feature spaces: what a distance between sets of pictures is measured in. The space is part of the figure's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """`network`: images (B, 3, H, W) in [-1, 1] of any size, on `device` -> (B, width + logits) float32."""

    name: str
    width: int
    network: Callable[[Tensor], Tensor]
    logits: int = 0  # columns behind the features: the network's class logits, for the Inception Score
    text: Callable[[Sequence[str]], Tensor] | None = None  # captions -> (N, width), where pictures and texts are joint
    hash: str = ""  # of the weights
    resize: str = ""  # how pictures are brought to the network's size
    note: str = ""  # what a reader of the figures must know
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, image: Tensor, batch_size: int | None = None) -> Tensor:
        """(N, 3, H, W) -> (N, width + logits) float32 on the CPU.

        `batch_size`: of the network; None: few on a CPU, whose caches they fit, more elsewhere.
        """
        parts = image.split(batch_size or (4 if self.device == "cpu" else 64))
        return torch.cat([self.network(part.float().to(self.device)).float().cpu() for part in parts])

    def protocol(self) -> dict[str, object]:
        """What a figure must say of it."""
        return {"name": self.name, "width": self.width, "hash": self.hash, "resize": self.resize, "note": self.note}


def resized(image: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, side, side): bicubic with a = -1/2 (or bilinear), antialiased, clamped.

    Pillow's filter, on floats: what the "clean" protocol of Parmar et al. 2022 does.
    """
    if image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image, (side, side), mode=mode, antialias=True, align_corners=False).clamp(-1, 1)
