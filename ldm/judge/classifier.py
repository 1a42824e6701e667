"""A small classifier of concepts: its features, not its classes, are what prompt accuracy is measured in.

It sees real pictures only, is no part of any loss or guidance, and does not ship. Its head compares directions
(the cosine between feature and class vector), so that nearest-prototype search asks the question it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.small import load_network, save_network
from ldm.settings import from_dict, to_dict

NAME = "classifier"


@dataclass(frozen=True)
class ClassifierConfig:
    """What the network is, and what it was trained on: the protocol of the figures made with it."""

    classes: tuple[str, ...] = ()  # names of the concepts, in the order of the logits
    styles: tuple[str, ...] = ()  # styles of the pictures it saw
    size: int = 64  # pixels
    channels: int = 32  # of the first stage; each of the three that follow has twice as many


class Classifier(nn.Module):
    """image (B, 3, size, size) in [-1, 1] -> logits (B, classes).

    A residual network of four stages (He et al. 2016) at size/2, size/4, size/8, size/16; its feature, the mean over
    positions of the last stage, has 8 * channels values.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * 2**stage for stage in range(4)]
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False)
        self.stages = nn.Sequential(
            *(Residual(w_in, w_out) for w_in, w_out in zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.directions = nn.Parameter(torch.randn(len(config.classes), widths[-1]) / math.sqrt(widths[-1]))
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))  # of the cosines, before the softmax

    def features(self, image: Tensor) -> Tensor:
        """(B, 8 * channels), of unit length."""
        h = self.norm(self.stages(self.stem(image))).relu()
        return F.normalize(h.mean(dim=(2, 3)), dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, classes): the scaled cosines between feature and class directions."""
        return self.log_scale.exp() * self.features(image) @ F.normalize(self.directions, dim=1).T


class Residual(nn.Module):
    """Pre-activation residual block; halves the side where the width grows."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.shrinks = width != width_in
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=2 if self.shrinks else 1, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(width_in, width, 1, bias=False) if self.shrinks else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x).relu())
        h = self.conv2(self.norm2(h).relu())
        return self.skip(F.avg_pool2d(x, 2) if self.shrinks else x) + h


# ---------------------------------------------------------------- on disk


def save_classifier(classifier: Classifier, directory: str | Path) -> None:
    """Write classifier.json and classifier.safetensors to `directory`."""
    save_network(directory, NAME, classifier, to_dict(classifier.config))


def load_classifier(directory: str | Path) -> Classifier:
    """The classifier that tools/train_classifier.py wrote, in evaluation mode; raises UserError."""

    def build(document: dict[str, Any], where: str) -> Classifier:
        return Classifier(from_dict(ClassifierConfig, document, where))

    return load_network(directory, NAME, build, "tools/train_classifier.py")
