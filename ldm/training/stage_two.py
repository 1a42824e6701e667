"""Stage two: the U-Net, on latents of a frozen autoencoder and contexts of a frozen text tower.

Algorithm 1 of Ho et al. 2020 in the coordinates of ldm/diffusion: draw sigma and n, form x = x0 + sigma n, and
regress the network's target. Some rows are trained on the encoded empty prompt, which is what guidance subtracts.
Latents and contexts come from pictures and captions on the fly, or from the shards of tools/precompute_latents.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.conditioning.dropout import drop
from ldm.conditioning.record import Conditioning
from ldm.config import AutoencoderConfig, DiffusionTraining, ModelConfig
from ldm.data.latents import LatentBatch, LatentLoader, latent_fingerprint
from ldm.data.loader import Batch, Loader, validation_batches
from ldm.diffusion import (
    check,
    diffusion_loss,
    draw_levels,
    make_parameterization,
    make_schedule,
    network_input,
)
from ldm.errors import UserError
from ldm.image_io import grid, save_png
from ldm.model import assemble
from ldm.training.draws import Draws
from ldm.training.stage import Batches, Player
from ldm.unet.unet import UNet

VALIDATION_SAMPLES = 512  # held-out samples of the validation loss, at most


class DiffusionStage:
    """The training of `config` on this process' share of the data."""

    def __init__(self, config: DiffusionTraining, rank: int, world: int, device: torch.device):
        if not 0 <= config.loss.caption_dropout <= 1:
            raise UserError(f"loss.caption_dropout is a share from 0 to 1, not {config.loss.caption_dropout}")
        torch.manual_seed(config.loop.seed)
        self.config, self.device = config, device
        self.schedule = make_schedule(config.schedule)
        self.parameterization = make_parameterization(config.parameterization)
        check(self.schedule, self.parameterization)
        self.codec = load_codec(config.autoencoder, device)
        self.text = self._text_tower()
        size = config.data.size
        self.latent_shape = self.codec.latent_shape(size, size)
        self._check_widths()
        self.unet = UNet(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.players = {"unet": Player(self.unet, config.optimizer)}
        self.null = self._condition([""])
        loop = config.loop
        if config.latents:
            expected = latent_fingerprint(config.autoencoder, config.text, config.data)
            data = dataclasses.replace(config.data, shards=config.latents)
            self.batches: Batches = LatentLoader(data, loop.global_batch, rank, world, loop.seed, expected)
        else:
            self.batches = Loader(config.data, loop.global_batch, rank, world, loop.seed)

    def describe(self) -> list[str]:
        c, h, w = self.latent_shape
        loss = self.config.loss
        return [
            f"latent      {c} x {h} x {w}, {'precomputed' if self.config.latents else 'encoded on the fly'}",
            f"noise       {self.config.schedule.kind}, sigma {self.schedule.sigma_min:.4g} to "
            f"{self.schedule.sigma_max:.4g}; levels {loss.levels}, weight {loss.weight}, {self.parameterization.name}; "
            f"caption dropout {loss.caption_dropout:g}",
        ]

    def losses(
        self, batch: Batch | LatentBatch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        x0, condition = self._prepare(batch, draws)
        keep = draws.uniform("caption dropout") >= self.config.loss.caption_dropout
        if condition is not None and self.null is not None:
            condition = drop(condition, self.null, keep)
        loss = self._loss(networks["unet"], x0, condition, draws).mean()
        yield "unet", loss, {"loss": loss}

    def validate(self) -> dict[str, float]:
        """The mean loss over held-out samples; noise and level of a sample are the same at every call."""
        if not self.config.data.validation:
            return {}
        total, count = 0.0, 0
        for batch in validation_batches(self.config.data, self.config.loop.global_batch):
            draws = Draws(self.config.loop.seed, "validation", batch.key, self.device)
            total += float(self._loss(self.unet, *self._prepare(batch, draws), draws).sum())
            count += len(batch.key)
            if count >= VALIDATION_SAMPLES:
                break
        return {"validation/loss": total / count}

    def draw(self, output: Path, step: int) -> None:
        """One picture for each prompt of `config.sample`, always from the same noise."""
        prompts = self.config.sample.prompts
        if not prompts or self.text is None:
            return
        model = assemble(self.model_config(), self.codec, self.text, self.unet)
        image = model.txt2img(
            list(prompts), cfg=self.config.sample.cfg, steps=self.config.sample.steps, seed=self.config.loop.seed
        )
        save_png(grid(image.cpu(), columns=min(8, len(prompts))), output / "samples" / f"{step:08d}.png", {})

    def export(self, output: Path, finished: bool) -> None:
        """The whole model, autoencoder and text tower included, as a native checkpoint."""
        parts: dict[str, nn.Module] = {"unet": self.unet}
        if self.codec.autoencoder is not None:
            parts["autoencoder"] = self.codec.autoencoder
        if self.text is not None:
            parts["text"] = self.text
        native.save(output, self.model_config(), parts)

    def model_config(self) -> ModelConfig:
        """What the trained model is."""
        return ModelConfig(
            autoencoder=self.codec.config,
            text=None if self.text is None else self.text.config,
            unet=self.config.model,
            schedule=self.config.schedule,
            parameterization=self.config.parameterization,
            image_size=self.config.data.size,
        )

    def _loss(self, network: nn.Module, x0: Tensor, condition: Conditioning | None, draws: Draws) -> Tensor:
        """(B,) for data x0 (B, C, h, w); sigma and n come from `draws`."""
        sigma = draw_levels(self.config.loss, self.schedule, draws.uniform("level"))
        n = draws.normal("noise", self.latent_shape)
        x = x0 + sigma.to(x0).view(-1, 1, 1, 1) * n
        x_in, t = network_input(x, sigma, self.schedule)
        x_in = x_in.contiguous(memory_format=torch.channels_last)
        output = network(x_in, t, None if condition is None else condition.context)
        return diffusion_loss(output, x0, n, sigma, self.config.loss, self.parameterization)

    @torch.no_grad()
    def _prepare(self, batch: Batch | LatentBatch, draws: Draws) -> tuple[Tensor, Conditioning | None]:
        """Latents (B, C, h, w) sampled from their posteriors, and conditions."""
        noise = draws.normal("posterior", self.latent_shape)
        if isinstance(batch, LatentBatch):
            posterior = DiagonalGaussian.from_moments(batch.moments.to(self.device))
            return self.codec.to_latent(posterior.sample(noise)), Conditioning(batch.context.to(self.device))
        return self.codec.encode(batch.image.to(self.device), noise), self._condition(batch.caption)

    @torch.no_grad()
    def _condition(self, captions: Sequence[str]) -> Conditioning | None:
        return None if self.text is None else Conditioning(self.text.encode(captions))

    def _text_tower(self) -> TextTower | None:
        if not self.config.model.context_width:
            return None
        if not self.config.text:
            raise UserError("model.context_width asks for captions but no text tower is named; say text=runs/clip")
        return native.load_text(self.config.text, self.device)

    def _check_widths(self) -> None:
        model, channels = self.config.model, self.latent_shape[0]
        if (model.in_channels, model.out_channels) != (channels, channels):
            raise UserError(
                f"the U-Net has {model.in_channels} input and {model.out_channels} output channels but latents have "
                f"{channels}; set model.in_channels={channels} model.out_channels={channels}"
            )
        if self.text is not None and self.text.config.width != model.context_width:
            raise UserError(
                f"the text tower's width is {self.text.config.width}; set model.context_width={self.text.config.width}"
            )


def load_codec(path: str, device: torch.device) -> Codec:
    """The frozen autoencoder at `path`; for an empty path the identity codec, which makes a pixel model."""
    if not path:
        return Codec(None, AutoencoderConfig(kind="identity", scale=(1.0,)))
    return native.load_autoencoder(path, device)
