"""A network sees a large latent piece by piece, at each step: as large a picture as one likes, of the trained size."""

from __future__ import annotations

from torch import Tensor

from ldm.autoencoder.tiling import map_tiles
from ldm.diffusion.denoiser import Denoiser


def windows(denoiser: Denoiser, side: int, overlap: int) -> Denoiser:
    """`denoiser` on windows of `side` x `side` that share `overlap` with the next, blended: x is one, so are its seams.

    MultiDiffusion (Bar-Tal et al. 2023, equation 5) with weights that fall towards a window's edge. Each window is told
    the whole prompt, so at a high level each draws all of it.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return map_tiles(lambda piece: denoiser(piece, sigma), x, side, overlap)

    return denoise
