"""A network's config -> the network: UNet or MMDiT, which are told and called in the same way."""

from __future__ import annotations

from typing import TypeAlias

from ldm.mmdit import mmdit
from ldm.mmdit.mmdit import MMDiT
from ldm.model_config import MMDiTConfig, UNetConfig
from ldm.unet import unet
from ldm.unet.unet import UNet

AnyNetwork: TypeAlias = UNet | MMDiT


def make_network(config: UNetConfig | MMDiTConfig) -> AnyNetwork:
    """A network of random weights. Raises UserError for a configuration that names none."""
    return MMDiT(config) if isinstance(config, MMDiTConfig) else UNet(config)


def check_network(config: UNetConfig | MMDiTConfig, name: str) -> None:
    """Raise UserError for a configuration that names no network; `name` is that of the settings in the message."""
    mmdit.check(config, name) if isinstance(config, MMDiTConfig) else unet.check(config, name)
