"""Codec: image in [-1, 1] <-> latent of unit variance. The only home of shift and scale, and of tiling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.posterior import LOGVAR_RANGE, DiagonalGaussian
from ldm.autoencoder.tiling import map_tiles
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig


class Codec:
    """Everything outside the first stage's training sees pictures and latents through this.

    latent = (z - shift) * scale, where z is the autoencoder's own latent; shift and scale are one number or one for
    each channel. Without an autoencoder (config.kind "identity") z is the picture itself.

    Images are float32 (B, 3, H, W) in [-1, 1], latents float32 (B, C, h, w); the network runs in its parameters'
    dtype. Gradients flow: whoever only wants numbers calls under `torch.no_grad()`. A result that is not finite is
    computed once more in float32, and raises UserError if it still is not.
    """

    def __init__(self, autoencoder: AutoencoderKL | None, config: AutoencoderConfig) -> None:
        if (autoencoder is None) != (config.kind == "identity"):
            raise ValueError(
                f"kind '{config.kind}' does not go with {'no' if autoencoder is None else 'an'} autoencoder"
            )
        self.autoencoder = autoencoder
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.channels_of_latent
        self._shift = self._per_channel(config.shift, "shift")
        self._scale = self._per_channel(config.scale, "scale")
        if not bool((self._scale > 0).all() and self._scale.isfinite().all() and self._shift.isfinite().all()):
            raise UserError("the autoencoder's scale must be positive and its shift finite; measure both over the data")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Codec:
        """Move and cast the autoencoder, in place; returns self. The borders stay float32."""
        if self.autoencoder is not None:
            self.autoencoder.to(device=device, dtype=dtype)
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture of `height` x `width` pixels; UserError if f does not divide them."""
        f = self.factor
        if height < 1 or width < 1 or height % f or width % f:
            near = " or ".join(f"{w}x{h}" for h, w in _nearest(height, width, f))
            raise UserError(
                f"a size of {width}x{height} pixels does not fit: width and height must be multiples of {f}; try {near}"
            )
        return self.latent_channels, height // f, width // f

    # ------------------------------------------------------------ latents of unit variance and back

    def to_latent(self, z: Tensor) -> Tensor:
        """(z - shift) * scale"""
        return (z - self._shift.to(z)) * self._scale.to(z)

    def from_latent(self, latent: Tensor) -> Tensor:
        """latent / scale + shift, the inverse of `to_latent`"""
        return latent / self._scale.to(latent) + self._shift.to(latent)

    # ------------------------------------------------------------ whole pictures

    def posterior(self, image: Tensor) -> DiagonalGaussian:
        """The unscaled posterior of the pictures; the identity's is as narrow as a posterior can be."""
        self.latent_shape(*image.shape[-2:])
        if self.autoencoder is None:
            z = image.float()
            return DiagonalGaussian(z, torch.full_like(z, LOGVAR_RANGE[0]))
        return DiagonalGaussian.from_moments(self._run(_moments, image, "encoding a picture"))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image -> latent: the posterior's mode, or its sample with `noise` (B, C, h, w) of unit normals."""
        return self._latent(self.posterior(image), noise)

    def decode(self, latent: Tensor) -> Tensor:
        """latent -> image, clamped to [-1, 1]"""
        return self._decode_z(self.from_latent(latent.float())).clamp(-1.0, 1.0)

    # ------------------------------------------------------------ large pictures, piece by piece

    def overlap(self, tile: int) -> int:
        """A quarter of `tile` pixels, about: what tiles share where nobody says it. UserError for a tile that f does
        not divide."""
        overlap = tile // 4 // self.factor * self.factor
        self._check_tiles(tile, overlap)
        return overlap

    def encode_tiled(self, image: Tensor, tile: int, overlap: int, noise: Tensor | None = None) -> Tensor:
        """`encode` in tiles of `tile` pixels that share `overlap` pixels with the next, blended in the latent.

        Both are pixels of the picture, multiples of f (UserError otherwise). Memory is that of one tile.
        """
        self.latent_shape(*image.shape[-2:])
        self._check_tiles(tile, overlap)
        f = self.factor
        moments = map_tiles(lambda piece: self.posterior(piece).moments(), image, tile, overlap, shrink=f)
        return self._latent(DiagonalGaussian.from_moments(moments), noise)

    def decode_tiled(self, latent: Tensor, tile: int, overlap: int) -> Tensor:
        """`decode` in tiles; `tile` and `overlap` are pixels of the picture, as in `encode_tiled`."""
        self._check_tiles(tile, overlap)
        f = self.factor
        z = self.from_latent(latent.float())
        return map_tiles(self._decode_z, z, tile // f, overlap // f, grow=f).clamp(-1.0, 1.0)

    # ------------------------------------------------------------ inside

    def _latent(self, posterior: DiagonalGaussian, noise: Tensor | None) -> Tensor:
        if noise is None or self.autoencoder is None:
            return self.to_latent(posterior.mode())
        return self.to_latent(posterior.sample(noise))

    def _decode_z(self, z: Tensor) -> Tensor:
        if not bool(z.isfinite().all()):
            raise UserError("the latent to decode has values that are not finite; lower cfg or use --precision fp32")
        return z if self.autoencoder is None else self._run(_image, z, "decoding a latent")

    def _run(self, work: Callable[[AutoencoderKL, Tensor], Tensor], x: Tensor, doing: str) -> Tensor:
        """`work` in the autoencoder's precision and float32 out; once more in full float32 if it overflows."""
        autoencoder = self.autoencoder
        assert autoencoder is not None
        dtype = next(autoencoder.parameters()).dtype
        out = work(autoencoder, x.to(dtype)).float()
        if bool(out.isfinite().all()):
            return out
        with torch.autocast(x.device.type, enabled=False):
            out = work(copy.deepcopy(autoencoder).float(), x.float())
        if not bool(out.isfinite().all()):
            raise UserError(f"{doing} gave values that are not finite, in float32 too: check the autoencoder's weights")
        return out

    def _per_channel(self, values: tuple[float, ...], name: str) -> Tensor:
        """(1, 1 or C, 1, 1)"""
        if len(values) not in (1, self.latent_channels):
            raise UserError(
                f"the autoencoder's {name} has {len(values)} values; give one, or one for each of the "
                f"{self.latent_channels} latent channels"
            )
        return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)

    def _check_tiles(self, tile: int, overlap: int) -> None:
        f = self.factor
        if tile < f or overlap < 0 or overlap >= tile or tile % f or overlap % f:
            raise UserError(
                f"a tile of {tile} pixels with an overlap of {overlap} does not work: "
                f"both must be multiples of {f} and the overlap smaller than the tile"
            )


def _moments(autoencoder: AutoencoderKL, image: Tensor) -> Tensor:
    return autoencoder.encode(image).moments()


def _image(autoencoder: AutoencoderKL, z: Tensor) -> Tensor:
    return autoencoder.decode(z)


def _nearest(height: int, width: int, f: int) -> list[tuple[int, int]]:
    """The (height, width) that fit, just below and just above (once where both are the same)."""
    below = tuple(max(side // f * f, f) for side in (height, width))
    above = tuple(max(-(-side // f) * f, f) for side in (height, width))
    return [below] if below == above else [below, above]  # type: ignore[return-value]
