"""A training that goes on from a model: its networks, and what they are, in place of the settings' own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import networks
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.clip import TextTower
from ldm.config import DiffusionTraining
from ldm.errors import UserError
from ldm.model import find
from ldm.unet.unet import UNet


@dataclass(frozen=True)
class Beginning:
    """The networks of the model that a training begins with; the U-Net is ready to be trained."""

    codec: Codec
    text: TextTower
    unet: UNet


def begin(config: DiffusionTraining, device: torch.device) -> tuple[DiffusionTraining, Beginning | None]:
    """`config` with the architecture, schedule and target of the model at `config.init`, and that model's networks.

    Without init: `config` as it is, and None. Raises UserError if init is no whole model, if an autoencoder or text
    tower is named beside it, or if a LoRA has no model to change.
    """
    if not config.init:
        if config.lora.rank:
            raise UserError("a LoRA changes a model that is there; name it with init=PATH (or init=icons)")
        return config, None
    if config.autoencoder or config.text:
        raise UserError("init brings its own autoencoder and text tower; leave out autoencoder= and text=")
    path = find(config.init)
    checkpoint = open_checkpoint(path)
    codec, text, unet = networks.build(checkpoint, device, torch.float32)
    unet.requires_grad_(True)
    model = checkpoint.config
    filled = dataclasses.replace(
        config,
        autoencoder=str(path) if codec.autoencoder is not None else "",
        text=str(path),
        model=unet.config,
        schedule=model.schedule or config.schedule,
        parameterization=model.parameterization,
        sigma_data=model.sigma_data,
        learned_variance=model.learned_variance,
    )
    return filled, Beginning(codec, text, unet)
