"""A training that goes on from a model: its networks, and what they are, in place of the settings' own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import networks
from ldm.checkpoints.opening import open_checkpoint, parse_settings
from ldm.conditioning.clip import TextTower
from ldm.config import DataConfig, DiffusionLossConfig, DiffusionTraining, ModelConfig, ScheduleConfig
from ldm.errors import UserError
from ldm.model import find
from ldm.unet.unet import UNet


@dataclass(frozen=True)
class Beginning:
    """The networks of the model that a training begins with; the U-Net is ready to be trained."""

    codec: Codec
    text: TextTower
    unet: UNet
    notices: tuple[str, ...]  # what was assumed of a foreign model, and which of its weights were taken


def begin(config: DiffusionTraining, device: torch.device) -> tuple[DiffusionTraining, Beginning | None]:
    """`config` with the architecture, schedule and target of the model at `config.init`, and that model's networks;
    with its loss too, where the model says it and `config` sets none.

    Without init: `config` with the usual target where none is named, and None. Raises UserError if init is no whole
    model, if an autoencoder or text tower is named beside it, if the settings say that it is another model than it
    says itself, or if a LoRA has no model to change.
    """
    if not config.init:
        if config.lora.rank:
            raise UserError("a LoRA changes a model that is there; name it with init=PATH (or init=icons)")
        if config.init_set:
            raise UserError("init_set says what the model of init is; name that with init=PATH, or leave init_set out")
        return dataclasses.replace(config, parameterization=config.parameterization or "v"), None
    if config.autoencoder or config.text:
        raise UserError("init brings its own autoencoder and text tower; leave out autoencoder= and text=")
    path = find(config.init)
    checkpoint = open_checkpoint(path, settings=parse_settings(config.init_set))
    _check_agreement(config, checkpoint.config)
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
        loss=model.loss if model.loss and config.loss == DiffusionLossConfig() else config.loss,
    )
    return filled, Beginning(codec, text, unet, checkpoint.notices)


def _check_agreement(config: DiffusionTraining, model: ModelConfig) -> None:
    """Raise UserError for a setting of the training's own that says something else than the model: one of them is
    wrong, and a network that is trained towards another target than its own unlearns everything."""
    schedule = model.schedule or ScheduleConfig()
    if config.parameterization not in ("", model.parameterization):
        raise UserError(
            f"parameterization is {config.parameterization} and the model {config.init} predicts "
            f"{model.parameterization}; leave it out, or say init_set=[parameterization={config.parameterization}] if "
            "the model does not know itself"
        )
    if config.schedule not in (ScheduleConfig(), schedule):
        raise UserError(
            f"schedule is another one ({config.schedule.kind}) than that of the model {config.init} ({schedule.kind}); "
            "leave it out, or say it by init_set=[schedule.kind=...] if the model does not know itself"
        )
    if config.data.size == DataConfig().size != model.image_size:  # nobody has chosen that size
        raise UserError(
            f"data.size is {config.data.size} unless it is set, and the model {config.init} was trained at "
            f"{model.image_size} pixels; set data.size={model.image_size}, or init_set=[image_size={config.data.size}]"
        )
