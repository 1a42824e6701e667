"""Latent text-to-image diffusion: train it, sample it, take it apart.

    import ldm
    model = ldm.load()
    images = model.txt2img("a red heart", cfg=7.5, seed=7)      # (1, 3, H, W) in [-1, 1]
    ldm.save_png(images[0], "heart.png")

The packages are the path of the data:

    shard -> caption, picture -> context, latent -> noise level -> U-Net -> guidance -> denoiser -> sampler -> picture
    data                         conditioning       diffusion      unet     guidance    diffusion   sampling
                                 autoencoder                                                        autoencoder
    `------------- training --------------------------------´      `------------- generate, image_io -----------´

Importing this costs nothing: the names below are fetched when they are first used.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing's own takes longer to import than all else that a script begins with
if TYPE_CHECKING:
    from typing import Any

    from ldm.api import LatentDiffusion, load
    from ldm.errors import UserError
    from ldm.image_io import grid, read_metadata, save_png, to_pil

_HOMES = {
    "LatentDiffusion": "api",
    "load": "api",
    "save_png": "image_io",
    "read_metadata": "image_io",
    "grid": "image_io",
    "to_pil": "image_io",
    "UserError": "errors",
}

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "UserError", "grid", "load", "read_metadata", "save_png", "to_pil"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ldm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
