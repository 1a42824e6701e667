"""What stage two begins with: the networks that its settings name, or a model to go on from and what that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldm.autoencoder.codec import Codec
from ldm.checkpoints.opening import open_checkpoint, open_towers, parse_settings
from ldm.checkpoints.record import Checkpoint
from ldm.conditioning.clip import TextTower
from ldm.conditioning.t5 import T5Tower
from ldm.config import (
    AutoencoderConfig,
    DataConfig,
    DiffusionLossConfig,
    DiffusionTraining,
    EmbeddingTraining,
    LoraConfig,
    ModelConfig,
    ScheduleConfig,
    to_dict,
)
from ldm.errors import UserError
from ldm.networks import AnyNetwork
from ldm.plain import leaves

DECIDED = ("parameterization", "sigma_data", "learned_variance", "schedule", "model", "encoder")  # by the model of init


@dataclass(frozen=True)
class Beginning:
    """The networks that a training of the U-Net begins with; the codec and the text tower stay as they are."""

    config: ModelConfig  # what the trained model is
    codec: Codec
    towers: Mapping[str, TextTower | T5Tower]  # none: the U-Net takes no captions
    unet: AnyNetwork | None  # that of the model of init, ready to be trained; None: the training makes a new one
    sources: Mapping[str, Checkpoint]  # part -> where it came from; the identity codec and a new U-Net have no place

    @property
    def notices(self) -> tuple[str, ...]:
        """What was assumed of foreign files, and which of their weights were taken."""
        return tuple(dict.fromkeys(notice for source in self.sources.values() for notice in source.notices))


def begin(config: DiffusionTraining, device: torch.device, said: Collection[str] = ()) -> Beginning:
    """The model at `config.init`, as `begin_from` has it, or without init the networks that `config` names, with the
    usual target where it names none.

    said: the dotted names of the settings that were written out, for those that equal their defaults. Raises UserError
    as `begin_from`, and if an autoencoder or text tower is named beside init, or if a LoRA has no model to change.
    """
    if not config.lora.rank and config.lora != LoraConfig():
        raise UserError("lora.rank is 0, which trains the weights themselves; set it, or leave out the rest of lora")
    if not config.init:
        return _begin_anew(config, device)
    if config.autoencoder or config.text or config.text_2:
        raise UserError("init brings its own autoencoder and text towers; leave out autoencoder=, text= and text_2=")
    return begin_from(config, device, said)


def begin_from(
    config: DiffusionTraining | EmbeddingTraining, device: torch.device, said: Collection[str] = ()
) -> Beginning:
    """The model at `config.init`, to be trained on pictures of `config.data.size` with the loss that it says, unless
    `config` sets one. Raises UserError if it is no whole model, or if settings say that it is another than it says.
    """
    checkpoint = open_checkpoint(config.init, settings=parse_settings(config.init_set))
    model, size = checkpoint.config, config.data.size
    if size == DataConfig().size != model.image_size:  # nobody has chosen that size
        raise UserError(
            f"data.size is {size} unless it is set, and the model {config.init} was trained at "
            f"{model.image_size} pixels; set data.size={model.image_size}, or init_set=[image_size={size}]"
        )
    if isinstance(config, DiffusionTraining):
        _check_agreement(config, model, said)
    unet = checkpoint.load("unet", device).requires_grad_(True)
    codec = checkpoint.load("autoencoder", device)
    towers = checkpoint.load_towers(device, rest=isinstance(config, DiffusionTraining) and config.latents != "")
    there = ("autoencoder", *towers, "unet")
    own_loss = config.loss != DiffusionLossConfig() or any(name.startswith("loss.") for name in said)
    made = dataclasses.replace(
        model,
        autoencoder=codec.config,
        **{name: tower.config for name, tower in towers.items()},
        schedule=model.schedule or ScheduleConfig(),
        image_size=size,
        loss=config.loss if own_loss or model.loss is None else model.loss,
    )
    return Beginning(made, codec, towers, unet, dict.fromkeys(there, checkpoint))


def _begin_anew(config: DiffusionTraining, device: torch.device) -> Beginning:
    """What `begin` gives without init."""
    if config.lora.rank:
        raise UserError("a LoRA changes a model that is there; name it with init=PATH (or init=icons)")
    if config.init_set:
        raise UserError("init_set says what the model of init is; name that with init=PATH, or leave init_set out")
    if config.text_2 and not config.text:
        raise UserError("text_2 names a second text tower, and text names no first one; say text= too")
    if config.model.context_width and not config.text:
        raise UserError("model.context_width asks for captions but no text tower is named; say text=runs/clip")
    third = config.encoder.t5_tokens > 0
    text = open_towers(config.text, config.text_2, third) if config.model.context_width else None
    towers = {} if text is None else text.load_towers(device, rest=config.latents != "")
    sources = {} if text is None else dict.fromkeys(towers, text)
    if config.autoencoder:
        sources["autoencoder"] = open_checkpoint(config.autoencoder).only("autoencoder")
    identity = AutoencoderConfig(kind="identity", scale=(1.0,))
    readers: dict[str, Any] = {name: tower.config for name, tower in towers.items()}
    codec = sources["autoencoder"].load("autoencoder", device) if config.autoencoder else Codec(None, identity)
    made = ModelConfig(
        autoencoder=codec.config,
        **readers,
        unet=config.model,
        schedule=config.schedule,
        parameterization=config.parameterization or "v",
        sigma_data=config.sigma_data,
        learned_variance=config.learned_variance,
        image_size=config.data.size,
        loss=config.loss,
        encoder=config.encoder,
    )
    return Beginning(made, codec, towers, None, sources)


def _check_agreement(config: DiffusionTraining, model: ModelConfig, said: Collection[str]) -> None:
    """Raise UserError for a setting of the training's own that says something else than the `model` of init does: one
    of them is wrong, and a network that is trained towards another target than its own unlearns all."""
    usual, own, of_init = (to_dict(each) for each in (DiffusionTraining(), config, model))
    of_init |= {
        "model": to_dict(model.unet or config.model),
        "schedule": to_dict(model.schedule or ScheduleConfig()),
    }
    for group in DECIDED:
        default, theirs = dict(leaves({group: usual[group]})), dict(leaves({group: of_init[group]}))
        for name, value in leaves({group: own[group]}):
            other = theirs.get(name, "not there")  # of another kind of network
            if value in (other, "") or (value == default.get(name) and name not in said):
                continue
            of_model = name.replace("model.", "unet.")
            told = f"[{of_model}={value}]" if group != "model" or name == "model.dropout" else ""
            raise UserError(
                f"{name} is {value}, and that of the model {config.init} is {other}; leave it out"
                + (f", or say init_set={told} if the model does not know itself" if told else "")
            )
