"""Stage two: the U-Net, on latents of a frozen autoencoder and contexts of a frozen text tower.

Algorithm 1 of Ho et al. 2020 in the coordinates of ldm/diffusion: draw sigma and n, form x = x0 + sigma n, and
regress the network's target. Some rows are trained on the encoded empty prompt, which is what guidance subtracts.
What schedule, target, weight and level draw may be is in ldm/diffusion; nothing here depends on which they are.
Latents and contexts come from pictures and captions on the fly, or from the shards of tools/precompute_latents.py.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.low_rank import AdaptedUNet
from ldm.api import PromptNotice, assemble
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.checkpoints import native
from ldm.checkpoints.adapter_words import training_words
from ldm.checkpoints.export import where_to
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.lora import save_lora
from ldm.conditioning.clip import TextTower
from ldm.conditioning.condition import Condition, drop
from ldm.conditioning.encoder import Encoder, Texts
from ldm.config import DiffusionLossConfig, DiffusionTraining, FiguresConfig, ModelConfig
from ldm.data.latents import LatentBatch, LatentLoader, latent_fingerprint
from ldm.data.loader import Batch, Loader, PictureDecode, validation_batches
from ldm.diffusion import Law, check_loss, diffusion_loss, draw_levels, make_law
from ldm.diffusion.parameterization import per_picture
from ldm.diffusion.schedule import check_used
from ldm.errors import UserError
from ldm.image_io import grid, save_png
from ldm.jobs import Ask
from ldm.training.begin import begin
from ldm.training.draws import Draws
from ldm.training.meters import EACH_LOSS, EACH_SIGMA
from ldm.training.preflight import (
    check_figures,
    check_no_label,
    check_pictures,
    check_settings,
    check_sides,
    check_validation,
)
from ldm.training.stage import Batches, Player
from ldm.unet import unet
from ldm.unet.attention import check_backend
from ldm.unet.unet import UNet

VALIDATION_SAMPLES = 512  # held-out samples of the validation loss, at most
COMMON_LEVELS = DiffusionLossConfig(levels="logit_normal")  # of the figure that compares all trainings


class DiffusionStage:
    """The training of `config` on this process' share of the data.

    said: the dotted names of the settings that were written out; what the model of init contradicts is refused even
    where it equals a default.
    """

    def __init__(
        self, config: DiffusionTraining, rank: int, world: int, device: torch.device, said: Collection[str] = ()
    ):
        check_settings(config, world)
        check_backend(config.attention, device.type)
        torch.manual_seed(config.loop.seed)
        if not config.init:
            unet.check(config.model, "model")
            check_size(ModelConfig(unet=config.model, schedule=config.schedule), "this run")
            check_used(config.schedule)
            if config.text and not config.model.context_width:
                raise UserError("text names a text tower, and with model.context_width=0 none is used; set one of them")
        config, began = begin(config, device, said)
        if began.text is None:  # then pictures need none
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, caption="none"))
        elif config.data.caption == "none":
            raise UserError("data.caption is none, and the text tower reads captions; set it to txt or variants")
        self.config, self.device = config, device
        self.notices, self.sources = list(began.notices), began.sources
        self.law = make_law(config.schedule, config.parameterization, config.sigma_data, config.learned_variance)
        check_loss(config.loss, config.learned_variance)
        self.codec, self.encoder = began.codec, Encoder(began.text, config.encoder, config.model.classes)
        check_sides(config.data, self.codec.factor)
        self.latent_shape = self.codec.latent_shape(config.data.size, config.data.size)
        self._check_fits()
        self.unet = UNet(config.model) if began.unet is None else began.unet
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.unet.set_attention_backend(config.attention)
        lora = config.lora
        self.lora = AdaptedUNet(self.unet, lora.rank, lora.alpha or lora.rank, lora.layers) if lora.rank else None
        self.players = {"unet": Player(self.lora or self.unet, config.optimizer)}
        self.empty = self.encoder.texts([""])
        self.rank, self.world, self._batches = rank, world, cache(self._open_batches)
        if rank == 0:
            check_validation(config.data, self.encoder.rows)
            self.check_end()

    @property
    def batches(self) -> Batches:
        """Of pictures, or of latents encoded beforehand. Opened when they are first asked for: an export needs none."""
        return self._batches()

    def _open_batches(self) -> Batches:
        config, loop = self.config, self.config.loop
        share = loop.global_batch, self.rank, self.world, loop.seed
        if not config.latents:
            return Loader(config.data, *share, PictureDecode(config.data, self.encoder.rows))
        expected = latent_fingerprint(self.sources.get("autoencoder"), self.sources.get("text"), config.data)
        cached = dataclasses.replace(config.data, shards=config.latents)
        return LatentLoader(cached, *share, expected, self.encoder.rows)

    def check_end(self) -> None:
        """Raise UserError unless the pictures and figures asked for can be made; notes what to know of them."""
        config = self.config
        if self.text is None:
            self.notices += ["sample.prompts are not drawn, for the model takes none"] if config.sample.prompts else []
            return
        if config.sample.prompts:
            model = assemble(self.model_config(), self.codec, self.text, self.unet)
            self.notices += check_pictures(model, config.sample, config.loop.seed)
        if config.figures.pictures:
            check_figures(config, self.device.type)

    def describe(self) -> list[str]:
        c, h, w = self.latent_shape
        loss = self.config.loss
        target = self.law.parameterization.name + (" with learned variance" if self.law.learned_variance else "")
        levels = ("stratified " if loss.stratified else "") + loss.levels
        blind = self.text is not None and not self.config.sample.prompts
        unseen = ["no pictures are drawn on the way, for sample.prompts is empty"] if blind else []
        return [
            f"latent      {c} x {h} x {w}, {'precomputed' if self.config.latents else 'encoded on the fly'}",
            f"noise       {self.config.schedule.kind}, sigma {self.law.schedule.sigma_min:.4g} to "
            f"{self.law.schedule.sigma_max:.4g}; levels {levels}, weight {loss.weight}, {target}; "
            f"caption dropout {loss.caption_dropout:g}",
            *([f"export      {where_to(self.model_config())}"] if self.lora is None else []),
            *(f"note        {notice}" for notice in [*self.notices, *unseen]),
        ]

    def losses(
        self, batch: Batch | LatentBatch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        x0, condition = self._prepare(batch, draws)
        keep = draws.uniform("caption dropout") >= self.config.loss.caption_dropout
        condition = drop(condition, self.encoder.null(self._asks(batch), self.empty), keep)
        loss, logs = self.noised(networks["unet"], x0, condition, draws)
        yield "unet", loss, logs

    def noised(
        self, network: nn.Module, x0: Tensor, condition: Condition, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of `network` on latents x0 (B, C, h, w), with noise and levels drawn; and what to log of it."""
        settings = self.config.loss
        uniform = draws.stratified("level") if settings.stratified else draws.uniform("level")
        sigma = draw_levels(settings, self.law.schedule, uniform)
        n, seen = training_noise(settings, draws, x0.shape[1:])
        each = self._loss(self._output(network, x0, seen, sigma, condition), x0, n, sigma)
        loss = each.mean()
        return loss, {"loss": loss, EACH_LOSS: each, EACH_SIGMA: sigma}

    def validate(self) -> dict[str, float]:
        """Two means over held-out samples, whose noise and level are the same at every call.

        `validation/loss` is what is trained, on plain noise. `validation/error` is (1 + 1 / sigma^2) |D - x0|^2 with
        ln sigma ~ N(0, 1): it means the same for every schedule, target, weight and draw, and is 1 for a denoiser that
        knows nothing but that data have zero mean and unit variance. Then the figures of scripts/evaluate.py on few
        pictures, if `config.figures` asks for them.
        """
        if not self.config.data.validation:
            return self._figures()
        loss, error, count = 0.0, 0.0, 0
        for batch in validation_batches(self.config.data, self.config.loop.global_batch, self.encoder.rows):
            draws = Draws(self.config.loop.seed, "validation", batch.key, self.device)
            x0, condition = self._prepare(batch, draws)
            n = draws.normal("noise", x0.shape[1:])
            sigma = draw_levels(self.config.loss, self.law.schedule, draws.uniform("level"))
            output = self._output(self.unet, x0, n, sigma, condition)
            loss += float(self._loss(output, x0, n, sigma).sum())
            sigma = draw_levels(COMMON_LEVELS, self.law.schedule, draws.uniform("common level"))
            output = self._output(self.unet, x0, n, sigma, condition)
            error += float(relative_error(output, x0, n, sigma, self.law).sum())
            count += len(batch.key)
            if count >= VALIDATION_SAMPLES:
                break
        return {"validation/loss": loss / count, "validation/error": error / count} | self._figures()

    def _figures(self) -> dict[str, float]:
        if not self.config.figures.pictures or self.text is None:  # the latter is refused at the start
            return {}
        from ldm.metrics.watch import watch

        model = assemble(self.model_config(), self.codec, self.text, self.unet)
        return watch(model, self.config.figures, self.config.data, self.config.sample)

    def draw(self, output: Path, step: int) -> None:
        """One picture for each prompt of `config.sample`, always from the same noise."""
        prompts = self.config.sample.prompts
        if not prompts or self.text is None:
            return
        model = assemble(self.model_config(), self.codec, self.text, self.unet)
        sample, seed = self.config.sample, self.config.loop.seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptNotice)  # the plan has said it
            image = model.txt2img(list(prompts), cfg=sample.cfg, steps=sample.steps, seed=seed)
        save_png(grid(image.cpu(), columns=min(8, len(prompts))), output / "samples" / f"{step:08d}.png", {})

    def export(self, output: Path, finished: bool) -> None:
        """The whole model, autoencoder and text tower included, as a native checkpoint; of a LoRA itself alone."""
        if self.lora is not None:
            words = training_words("lora", self.config, self.sources["unet"], finished)
            save_lora(output / "lora.safetensors", self.lora.lora(), self.unet, None, words=words)
            return
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
            encoder=self.encoder.config,
            schedule=self.config.schedule,
            parameterization=self.config.parameterization,
            sigma_data=self.config.sigma_data,
            learned_variance=self.config.learned_variance,
            image_size=self.config.data.size,
            loss=self.config.loss,
        )

    def _output(self, network: nn.Module, x0: Tensor, n: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """What `network` makes of x0 + sigma n, with x0 and n (B, C, h, w), sigma (B,)."""
        x = x0 + sigma.to(x0).view(-1, 1, 1, 1) * n
        x_in, t = self.law.input(x, sigma)
        x_in = x_in.contiguous(memory_format=torch.channels_last)
        return network(x_in, t, condition)

    def _loss(self, output: Tensor, x0: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
        """(B,)"""
        return diffusion_loss(output, x0, n, sigma, self.config.loss, self.law)

    @torch.no_grad()
    def _prepare(self, batch: Batch | LatentBatch, draws: Draws) -> tuple[Tensor, Condition]:
        """Latents (B, C, h, w) sampled from their posteriors, and conditions."""
        if isinstance(batch, LatentBatch):
            noise = draws.normal("posterior", self.latent_shape)
            posterior = DiagonalGaussian.from_moments(batch.moments.to(self.device))
            context = None if self.text is None else batch.context.to(self.device)
            told = self.encoder.of_texts(self._asks(batch), Texts(context))
            return self.codec.to_latent(posterior.sample(noise)), told.to(self.device)
        height, width = batch.image.shape[2:]  # of its bucket, where pictures have buckets
        noise = draws.normal("posterior", self.codec.latent_shape(height, width))
        asks = self._asks(batch)
        return self.codec.encode(batch.image.to(self.device), noise), self.encoder(asks).to(self.device)

    def _asks(self, batch: Batch | LatentBatch) -> list[Ask]:
        """What each sample shows, as somebody would ask for it; the text of cached latents is encoded already."""
        size = self.config.data.size
        captions, target = [""] * len(batch), (size, size)
        if isinstance(batch, Batch):
            captions, target = batch.caption, (batch.image.shape[2], batch.image.shape[3])
        rows = zip(captions, batch.label, batch.size.tolist(), batch.crop.tolist(), strict=True)
        return [Ask(text, label, (h, w), (top, left), target) for text, label, (h, w), (top, left) in rows]

    @property
    def text(self) -> TextTower | None:
        return self.encoder.text

    def _check_fits(self) -> None:
        figures = self.config.figures
        if not figures.pictures and figures != FiguresConfig():
            raise UserError("figures.pictures is 0, which measures nothing; set it, or leave out the rest of figures")
        model, channels = self.config.model, self.latent_shape[0]
        if not model.classes:
            check_no_label(self.config.data)
        elif not self.config.data.label:
            raise UserError(
                f"model.classes is {model.classes} and data.label is not set; say data.label=FIELD, the field of the "
                "samples' json that says the class, or set model.classes=0"
            )
        if model.vector_width != self.encoder.vector_width:
            raise UserError(
                f"model.vector_width is {model.vector_width} and the vector made of encoder.pooled and encoder.sizes "
                f"{self.encoder.vector_width} wide; set model.vector_width={self.encoder.vector_width}"
            )
        wanted = channels * (1 + self.config.learned_variance)
        if (model.in_channels, model.out_channels) != (channels, wanted):
            why = ", and as many again say the learned variance" if self.config.learned_variance else ""
            raise UserError(
                f"the U-Net has {model.in_channels} input and {model.out_channels} output channels but latents have "
                f"{channels}{why}; set model.in_channels={channels} model.out_channels={wanted}"
            )
        if self.text is None and self.config.figures.pictures:
            raise UserError(
                "figures.pictures asks for pictures of captions, and a model without a text tower draws none; "
                "set figures.pictures=0"
            )
        if self.text is not None and self.text.config.width != model.context_width:
            raise UserError(
                f"the text tower's width is {self.text.config.width}; set model.context_width={self.text.config.width}"
            )


def training_noise(config: DiffusionLossConfig, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The noise that the target is made of, and that which the network sees: n and n + g n', both (B, *shape).

    Both have the offset, one number for each channel of each sample, so that the network learns to move a picture's
    mean (Guttenberg 2023). g is the input perturbation: in sampling x comes from the network's own errors, and a
    network that was trained on slightly more noise than its target says forgives them (Ning et al. 2023, algorithm 1).
    """
    n = draws.normal("noise", shape)
    if config.offset_noise:
        n = n + config.offset_noise * draws.normal("offset noise", (shape[0], 1, 1))
    if not config.input_perturbation:
        return n, n
    return n, n + config.input_perturbation * draws.normal("input perturbation", shape)


def relative_error(output: Tensor, x0: Tensor, n: Tensor, sigma: Tensor, law: Law) -> Tensor:
    """(1 + 1 / sigma^2) |D - x0|^2 (B,), mean over C, h, w: the share of the variance of N(0, I) left unexplained.

    Given x, an x0 ~ N(0, I) has the variance sigma^2 / (1 + sigma^2). `output` is the network's on x0 + sigma n.
    """
    found = law.denoised(output, x0 + per_picture(sigma, x0) * n, sigma)
    return (1 + sigma.to(x0) ** -2) * (found - x0).square().flatten(1).mean(dim=1)
