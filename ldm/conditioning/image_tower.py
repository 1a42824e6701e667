"""PICTURE -> FEATURES: the picture side of our own CLIP, a small vision transformer (Dosovitskiy et al. 2021).

It is trained along with the text tower and does not ship: no sampling needs it. It is kept beside the text tower
that it was trained with (`image_tower.json`, `image_tower.safetensors`), since both together measure how well a
picture fits a caption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm import ranges
from ldm.checkpoints.small import load_network, save_network
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import ImageTowerConfig, from_dict, to_dict
from ldm.errors import UserError

NAME = "image_tower"


class ImageTower(nn.Module):
    """Pictures (B, 3, size, size) in [-1, 1] -> (B, embed_dim), not normalised; open_clip's VisionTransformer.

    Raises UserError for sizes that do not divide.
    """

    def __init__(self, config: ImageTowerConfig, embed_dim: int) -> None:
        super().__init__()
        ranges.check(config, prefix="image_tower.")
        if config.size % config.patch:
            raise UserError(f"image_tower.size={config.size} is not a multiple of image_tower.patch={config.patch}")
        if config.width % config.heads:
            raise UserError(
                f"image_tower.heads={config.heads} does not divide image_tower.width={config.width}; choose a divisor"
            )
        if embed_dim < 1:
            raise UserError(f"model.embed_dim is {embed_dim}, and pictures and captions meet in that many dimensions")
        declare_missing_operators()
        from open_clip.transformer import VisionTransformer

        self.config, self.embed_dim = config, embed_dim
        self.transformer = VisionTransformer(
            image_size=config.size,
            patch_size=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=embed_dim,
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.transformer(image)


def save_image_tower(directory: str | Path, tower: ImageTower, logit_scale: float) -> None:
    """Write the tower into `directory`; similarities are trained as `logit_scale` times the cosine."""
    document = {**to_dict(tower.config), "embed_dim": tower.embed_dim, "logit_scale": logit_scale}
    save_network(directory, NAME, tower, document)


def load_image_tower(directory: str | Path) -> ImageTower:
    """The tower that `save_image_tower` wrote, frozen, on the CPU; raises UserError for a missing or damaged file."""

    def build(document: dict[str, Any], where: str) -> ImageTower:
        embed_dim = int(document.pop("embed_dim"))
        document.pop("logit_scale")
        return ImageTower(from_dict(ImageTowerConfig, document, where), embed_dim)

    return load_network(directory, NAME, build, "scripts/train_clip.py")
