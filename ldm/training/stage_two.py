"""Stage two: a diffusion model, of which the network or a LoRA is trained while the rest stays frozen.

`diffusion_stage` makes the stage (diffusion.py) of scripts/train_diffusion.py of what a configuration says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch

from ldm.adapters.low_rank import AdaptedUNet
from ldm.api import assemble
from ldm.checkpoints import native
from ldm.checkpoints.adapter_words import training_words
from ldm.checkpoints.foreign import where_to
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.lora import save_lora
from ldm.checkpoints.record import Checkpoint
from ldm.conditioning.encoder import Encoder
from ldm.config import DiffusionTraining, ModelConfig, OptimizerConfig, Regress
from ldm.data.latents import LatentLoader, latent_fingerprint
from ldm.data.loader import Loader, PictureDecode
from ldm.diffusion.schedule import check_used
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.model import Model
from ldm.networks import check_network, make_network
from ldm.training.begin import Beginning, begin
from ldm.training.diffusion import Course, DiffusionStage, Trained
from ldm.training.fewer_steps import drawn_by, make_objective, student_of
from ldm.training.fitting import check_fits
from ldm.training.inputs import Inputs
from ldm.training.objectives import Objective
from ldm.training.preflight import check_settings
from ldm.training.stage import Batches
from ldm.unet.attention import check_backend


def diffusion_stage(
    config: DiffusionTraining,
    rank: int,
    world: int,
    device: torch.device,
    said: Collection[str] = (),
    own: Callable[[Model], Objective] | None = None,
) -> DiffusionStage:
    """The training of a network, or of a LoRA of it, that `config` describes.

    said: the dotted names of the settings that were written out; what the model of init contradicts is refused even
    where it equals a default. own: makes an objective of the model, in place of the one of `config.objective`.
    """
    check_settings(config, world)
    check_backend(config.attention, device.type)
    torch.manual_seed(config.loop.seed)
    if not config.init:
        check_network(config.model, "model")
        check_size(ModelConfig(unet=config.model, schedule=config.schedule), "this run")
        check_used(config.schedule)
        if config.text and not config.model.context_width:
            raise UserError("text names a text tower, and with model.context_width=0 none is used; set one of them")
    began = begin(config, device, said)
    if not began.towers:  # then pictures need none
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, caption="none"))
    elif config.data.caption == "none":
        raise UserError("data.caption is none, and the text tower reads captions; set it to txt or variants")
    made = began.config
    assert made.unet is not None
    takes = check_fits(began, config.data, config.latents, config.figures)
    network = make_network(made.unet) if began.unet is None else began.unet
    teacher_network, network = network, student_of(network, config)
    made = dataclasses.replace(made, unet=network.config, drawing=drawn_by(config, made.drawing))
    assert made.loss is not None
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.gradient_checkpointing = config.gradient_checkpointing
    network.set_attention_backend(config.attention)
    model = assemble(made, began.codec, began.towers, network)
    course = Course(
        partial(_open_batches, config, began.sources, model.encoder, rank, world),
        config.data,
        config.loop,
        made.loss,
        config.sample,
        Settings(config.sample.cfg, config.sample.steps) if isinstance(config.objective, Regress) else Settings(),
        config.figures,
        config.latents,
        began.notices,
    )
    told = getattr(config.objective, "cfg_range", None)
    inputs = Inputs(model.codec, model.encoder, config.data.size, device, takes=takes, guidance=told)
    objective, teacher = (own(model), None) if own else make_objective(config, model.law, made.loss, teacher_network)
    trained = _lora_of(model, config, began) if config.lora.rank else _network_of(model, config.optimizer)
    held_out = None if isinstance(config.objective, Regress) and not own else objective
    return DiffusionStage(model, inputs, objective, trained, course, teacher, held_out, check=rank == 0)


def _open_batches(
    config: DiffusionTraining, sources: Mapping[str, Checkpoint], encoder: Encoder, rank: int, world: int
) -> Batches:
    share = config.loop.global_batch, rank, world, config.loop.seed
    if not config.latents:
        return Loader(config.data, *share, PictureDecode(config.data, encoder.rows))
    expected = latent_fingerprint(sources.get("autoencoder"), sources.get("text"), config.data, encoder.config)
    return LatentLoader(dataclasses.replace(config.data, shards=config.latents), *share, expected, encoder.rows)


def _network_of(model: Model, optimizer: OptimizerConfig) -> Trained:
    """All weights of the network; what is left is the whole model, autoencoder and text tower included."""
    parts = {"unet": model.unet, "autoencoder": model.codec.autoencoder, **model.encoder.weights}

    def export(output: Path, finished: bool) -> None:
        native.save(output, model.config, {name: part for name, part in parts.items() if part is not None})

    return Trained("unet", model.unet, optimizer, export, (f"export      {where_to(model.config)}",))


def _lora_of(model: Model, config: DiffusionTraining, began: Beginning) -> Trained:
    """Low-rank changes of the network; what is left is their file."""
    assert model.config.loss is not None
    said = config.lora
    adapted = AdaptedUNet(model.unet, said.rank, said.alpha or said.rank, said.layers)
    with_loss = dataclasses.replace(config, loss=model.config.loss)
    drawing = None if isinstance(config.objective, Regress) else model.config.drawing

    def export(output: Path, finished: bool) -> None:
        words = training_words("lora", with_loss, began.sources["unet"], finished, drawing)
        save_lora(output / "lora.safetensors", adapted.lora(), model.unet, None, words=words)

    return Trained("unet", adapted, config.optimizer, export)
