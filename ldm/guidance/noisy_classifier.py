"""p(class | x, sigma): a classifier of noisy latents, for classifier guidance (Dhariwal & Nichol 2021, section 4).

It is the way down of a U-Net, then the mean over positions and a linear layer. It is told ln sigma, not a schedule's t,
so any model of the same latents can be guided by it, whatever its schedule and parameterization.
tools/train_noisy_classifier.py trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.small import load_network, save_network
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.guidance.gradient import LogProbability
from ldm.settings import from_dict, to_dict
from ldm.unet.blocks import Downsample, ResidualBlock
from ldm.unet.embedding import FOURIER_UNIT, EmbeddingMLP, FourierFeatures

NAME = "noisy_classifier"


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """What the network is, and which latents at which levels it was trained on."""

    classes: tuple[str, ...] = ()  # names, in the order of the logits
    latent_channels: int = 4
    probe: tuple[float, ...] = ()  # latents.latent_probe of the codec
    channels: int = 64  # of the first level
    multipliers: tuple[int, ...] = (1, 2, 3)  # each level after the first has half the side
    blocks: int = 1  # residual blocks of a level
    dropout: float = 0.1
    sigma_min: float = 0.02  # of the trained levels
    sigma_max: float = 20.0


class NoisyClassifier(nn.Module):
    """x (B, C, h, w) = latent + sigma n, sigma () or (B,) -> logits (B, classes), float32.

    Levels beyond the trained ones are read as the nearest of them; guide between `sigma_min` and `sigma_max` only.
    """

    def __init__(self, config: NoisyClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding_width = config.channels, 4 * config.channels
        self.level_features = FourierFeatures(config.channels)
        self.level_embedding = EmbeddingMLP(config.channels, embedding_width)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.stages = nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            if level:
                self.stages.append(Downsample(width))
            for _ in range(config.blocks):
                following = config.channels * multiplier
                self.stages.append(ResidualBlock(width, following, embedding_width, True, config.dropout))
                width = following
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = nn.Linear(width, len(config.classes))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x.device, torch.float32).clamp(self.config.sigma_min, self.config.sigma_max)
        embedding = F.silu(self.level_embedding(self.level_features(FOURIER_UNIT * level.log().expand(len(x)))))
        h = self.conv_in((per_picture((1 + sigma**2).rsqrt(), x) * x).float())
        for stage in self.stages:
            h = stage(h, embedding) if isinstance(stage, ResidualBlock) else stage(h)
        # The mean comes first: group normalization would have taken each group's own out, and with it colour.
        return self.linear_out(F.silu(self.norm_out(h.mean(dim=(2, 3)))))

    def places(self, names: Sequence[str]) -> Tensor:
        """(B,) long: the place of each class among the logits; raises UserError for one that it does not know."""
        for name in names:
            if name not in self.config.classes:
                raise UserError(f"the classifier knows no class '{name}'; it knows {_some(self.config.classes, name)}")
        return torch.tensor([self.config.classes.index(name) for name in names])

    def of(self, labels: Tensor) -> LogProbability:
        """log p(label | x, sigma) (B,) for one label (B,) of each picture: what `classifier_guidance` takes."""

        def log_probability(x: Tensor, sigma: Tensor) -> Tensor:
            return -F.cross_entropy(self(x, sigma), labels.to(x.device), reduction="none")

        return log_probability


def _some(classes: Sequence[str], wanted: str, most: int = 5) -> str:
    import difflib

    near = difflib.get_close_matches(wanted, classes, n=most, cutoff=0.0)
    return ", ".join(near) + (f" and {len(classes) - len(near)} others" if len(classes) > len(near) else "")


# ---------------------------------------------------------------- on disk


def save_noisy_classifier(classifier: NoisyClassifier, directory: str | Path) -> None:
    """Write noisy_classifier.json and noisy_classifier.safetensors to `directory`."""
    save_network(directory, NAME, classifier, to_dict(classifier.config))


def load_noisy_classifier(directory: str | Path, device: str | torch.device = "cpu") -> NoisyClassifier:
    """The classifier that was saved there, frozen, in evaluation mode; raises UserError."""

    def build(document: dict[str, Any], where: str) -> NoisyClassifier:
        return NoisyClassifier(from_dict(NoisyClassifierConfig, document, where))

    return load_network(directory, NAME, build, "tools/train_noisy_classifier.py").to(device)
