"""The similarity that CLIP guidance follows: cosine between a picture's features and its caption's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ldm.guidance.gradient import Similarity


def cosine_similarity(encode: Callable[[Tensor], Tensor], size: int, caption: Tensor) -> Similarity:
    """Pictures (B, 3, H, W) -> their cosines (B,) with `caption` (B, E), the features of what each should show.

    `encode` maps pictures (B, 3, size, size) in [-1, 1] to features (B, E); pictures of another size are brought to it.
    With the project's own CLIP: `ImageTower`, `tower.config.size`, `TextTower.features`. Open_clip's image towers want
    pictures normalised by their own mean and deviation: do that in `encode`.
    """
    wanted = F.normalize(caption.detach().float(), dim=1)

    def similarity(image: Tensor) -> Tensor:
        if image.shape[-2:] != (size, size):
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return (F.normalize(encode(image).float(), dim=1) * wanted).sum(dim=1)

    return similarity
