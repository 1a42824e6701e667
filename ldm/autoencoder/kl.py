"""AutoencoderKL: picture <-> unscaled latent, with a Gaussian posterior."""

from __future__ import annotations

from torch import Tensor, nn

from ldm import ranges
from ldm.autoencoder.blocks import Decoder, Encoder, check_widths
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig


class AutoencoderKL(nn.Module):
    """The first stage (Rombach et al. 2022, section 3.1). The default configuration is Stable Diffusion's.

    Pictures are (B, in_channels, H, W) in [-1, 1] with H and W divisible by f = config.factor; latents are
    (B, latent_channels, H/f, W/f) as the encoder gives them. Shift and scale belong to the Codec alone.
    Raises UserError for a configuration that names no network.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        attention = [level in config.attention_levels for level in range(len(widths))]
        moments, latent = 2 * config.latent_channels, config.latent_channels
        shared = (widths, config.blocks, attention, config.middle_attention, config.patch, config.norm_groups)
        self.encoder = Encoder(config.in_channels, moments, *shared)
        self.to_moments = nn.Conv2d(moments, moments, 1) if config.latent_convs else nn.Identity()
        self.from_latent = nn.Conv2d(latent, latent, 1) if config.latent_convs else nn.Identity()
        self.decoder = Decoder(latent, config.in_channels, *shared)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """The posterior of the pictures' latents, in float32 whatever the network runs in."""
        return DiagonalGaussian.from_moments(self.to_moments(self.encoder(image)).float())

    def decode(self, z: Tensor) -> Tensor:
        """Pictures from unscaled latents; about [-1, 1], not clamped."""
        return self.decoder(self.from_latent(z))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, sample with `noise` (B, C, h, w), decode: one training pass. Returns (decoded, posterior)."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(noise)), posterior


def check(config: AutoencoderConfig, name: str = "autoencoder") -> None:
    """Raise UserError for a configuration that names no network; `name` is that of the settings in the message."""
    ranges.check(config, prefix=f"{name}.")
    if config.kind != "kl":
        raise UserError(f"an autoencoder of kind '{config.kind}' has no network; set {name}.kind to 'kl'")
    wrong = [level for level in config.attention_levels if level >= len(config.multipliers)]
    if wrong:
        last = len(config.multipliers) - 1
        raise UserError(f"{name}.attention_levels has {wrong[0]}; there are levels 0 to {last}")
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    check_widths(widths, f"{name}.channels", config.norm_groups)
