"""Stage one: the autoencoder, and against it a discriminator.

loss = L1 + perceptual + KL + lambda * adversarial (Esser et al. 2021; Rombach et al. 2022, appendix G), the
discriminator's own loss beside it. At the end the latents' shift and scale are measured over the data and written into
the checkpoint, so that stage two finds latents of zero mean and unit variance in every channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder import kl
from ldm.autoencoder.codec import Codec
from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.checkpoints import native
from ldm.checkpoints.foreign import where_to
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderConfig, AutoencoderTraining, ModelConfig
from ldm.data.loader import Batch, Loader, validation_batches
from ldm.errors import UserError
from ldm.metrics.quality import psnr, ssim
from ldm.training.draws import Draws, generator
from ldm.training.guard import Guard
from ldm.training.meters import EACH_LOSS
from ldm.training.preflight import check_settings, check_sides, check_untold, check_validation
from ldm.training.stage import Batches, Player

SHOWN = 16  # pictures in a reconstruction grid
SHRUNK = 0.25, 0.5, 0.75  # sides of a shrunk latent beside those of the whole one
UNSCALED = AutoencoderConfig()


class Reconstruction(nn.Module):
    """image, noise, size -> (decoded, moments), as one forward pass: what gradient synchronisation hooks into."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor, noise: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W), noise (B, C, h, w) -> decoded (B, 3, H, W), moments (B, 2C, h, w). With a size, latents
        are resized to it before they are decoded."""
        posterior = self.autoencoder.encode(image)
        z = posterior.sample(noise)
        return self.autoencoder.decode(z if size is None else resized(z, size)), posterior.moments()


class AutoencoderStage:
    """The training of `config` on this process' share of the data.

    said: the dotted names of the settings that were written out; what the autoencoder of init contradicts is refused.
    """

    def __init__(
        self,
        config: AutoencoderTraining,
        rank: int,
        world: int,
        device: torch.device,
        said: Collection[str] = (),
    ):
        check_settings(config, world)
        check_untold(config.data)
        begun = _autoencoder_of(config, said, device)
        if begun:
            config = dataclasses.replace(config, model=begun.config)
        if config.model.kind == "identity":
            raise UserError(
                "the identity codec has nothing to train; train_diffusion.py without autoencoder= makes a pixel model"
            )
        if config.loss.adversarial and config.loop.compile:
            # torch refuses it, and with donated buffers switched off gives wrong gradients instead (2.13, one thread).
            raise UserError(
                "loop.compile does not go with loss.adversarial: the adaptive weight walks the graph first, "
                "and compiled code overwrites what the second time needs; leave one of them out"
            )
        if config.loss.adversarial and 0 < config.loss.guard <= 1:
            raise UserError(f"loss.guard is a factor above 1, or 0 for none, not {config.loss.guard}")
        kl.check(config.model, "model")
        if config.model.in_channels != 3:
            raise UserError(f"model.in_channels is {config.model.in_channels}, and pictures have 3; leave it out")
        if not begun and (config.model.shift, config.model.scale) != (UNSCALED.shift, UNSCALED.scale):
            raise UserError("model.shift and model.scale are measured when the training ends; leave them out")
        if not (config.loss.l1 or config.loss.gradient or config.loss.perceptual):
            raise UserError(
                "loss.l1, loss.gradient and loss.perceptual are all 0, so no loss asks for the picture; set one"
            )
        check_size(ModelConfig(autoencoder=config.model, image_size=config.data.size), "this run")
        check_sides(config.data, config.model.factor)
        torch.manual_seed(config.loop.seed)
        self.config, self.device = config, device
        autoencoder = begun.autoencoder if begun and begun.autoencoder else AutoencoderKL(config.model)
        autoencoder.requires_grad_(True)
        if config.decoder_only:
            autoencoder.encoder.requires_grad_(False)
            autoencoder.to_moments.requires_grad_(False)
        self.autoencoder = autoencoder
        network = Reconstruction(autoencoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.players = {"autoencoder": Player(network, config.optimizer)}
        self.loss = AutoencoderLoss(config.loss).to(device)
        self.discriminator: PatchDiscriminator | None = None
        if config.loss.adversarial:
            self.discriminator = PatchDiscriminator(
                config.loss.discriminator_channels, config.loss.discriminator_layers
            )
            side = int(SHRUNK[0] * config.data.size) if config.loss.shrunk else config.data.size
            self.discriminator.check(side, side)
            rate = dataclasses.replace(config.optimizer, rate=config.loss.discriminator_rate, betas=(0.5, 0.9))
            self.players["discriminator"] = Player(self.discriminator, rate, averaged=False)
        self.judge: Guard | None = None
        if config.loss.adversarial and config.loss.guard:
            self.judge = Guard(config.loss.guard, config.loss.adversarial_start)
        # A codec of unit scale: shapes and the posterior; the real scale is known only at the end.
        self.codec = Codec(autoencoder, dataclasses.replace(config.model, shift=(0.0,), scale=(1.0,)))
        self.latent_shape = self.codec.latent_shape(config.data.size, config.data.size)
        self.batches: Batches = Loader(config.data, config.loop.global_batch, rank, world, config.loop.seed)
        if rank == 0:
            check_validation(config.data)

    def describe(self) -> list[str]:
        c, h, w = self.latent_shape
        size = self.config.data.size
        loss = self.config.loss
        terms = {
            "l1": loss.l1,
            "gradient": loss.gradient,
            loss.perceptual_net: loss.perceptual,
            "kl": loss.kl,
            f"adversarial (from step {loss.adversarial_start})": loss.adversarial,
        }
        return [
            f"latent      {c} x {h} x {w} of {size} x {size} pixels, f = {self.codec.factor}",
            "loss        " + " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight),
            f"export      {where_to(ModelConfig(self.config.model))}",
        ]

    def losses(
        self, batch: Batch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        image = batch.image.to(self.device, memory_format=torch.channels_last)
        noise = draws.normal("posterior", self.codec.latent_shape(*image.shape[2:]))
        size = self._shrunk(draws, *noise.shape[2:])
        decoded, moments = networks["autoencoder"](image, noise, size)
        if size is not None:
            image = resized(image, (size[0] * self.codec.factor, size[1] * self.codec.factor))
        loss, logs = self.loss.reconstruction(image, decoded, DiagonalGaussian.from_moments(moments.float()))
        ramp = self.loss.ramp(step)
        playing = self.discriminator is not None and ramp > 0
        if playing:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)  # this gradient is the decoder's
            adversarial = self.loss.adversarial(self.discriminator(decoded))
            self.discriminator.requires_grad_(True)
            weight = self.loss.adaptive_weight(loss, adversarial, self.autoencoder.decoder.last_layer.weight)
            if self.judge is not None:
                weight = weight * self.judge.weight
            logs |= {"adversarial": adversarial, "adversarial_weight": weight * ramp * self.config.loss.adversarial}
            loss = loss + logs["adversarial_weight"] * adversarial
        each = (decoded.detach().float() - image).abs().flatten(1).mean(1)
        yield "autoencoder", loss, {"loss": loss, EACH_LOSS: each, **logs}
        if playing:
            # One pass over real and decoded pictures together: DDP allows one forward for each backward.
            real, fake = networks["discriminator"](torch.cat([image, decoded.detach()])).chunk(2)
            loss = self.loss.discriminator(real, fake)
            yield "discriminator", loss, {"discriminator": loss, "real": real.mean(), "fake": fake.mean()}

    def _shrunk(self, draws: Draws, height: int, width: int) -> tuple[int, int] | None:
        """The size that this step's latents are to be shrunk to, or None; the same for all of a global batch.

        A latent that may be shrunk, and then means the shrunk picture, is smoother, and a diffusion model learns it in
        fewer steps (Kouzelis et al. 2025, without their rotations: pictures here have an upper side).
        """
        chance, by = torch.rand(2, generator=generator(*draws.address, "shrunk")).tolist()
        if chance >= self.config.loss.shrunk:
            return None
        factor = SHRUNK[int(by * len(SHRUNK))]
        return max(1, round(factor * height)), max(1, round(factor * width))

    def validate(self) -> dict[str, float]:
        """PSNR, SSIM and KL of reconstructions from the posterior's mode, mean over the held-out pictures."""
        if not self.config.data.validation:
            return {}
        totals = torch.zeros(3, dtype=torch.float64)
        count = 0
        for batch in validation_batches(self.config.data, self.config.loop.global_batch):
            image = batch.image.to(self.device, memory_format=torch.channels_last)
            posterior = self.codec.posterior(image)
            decoded = self.autoencoder.decode(posterior.mode()).float().clamp(-1, 1)
            figures = torch.stack([psnr(decoded, image), ssim(decoded, image), posterior.kl()])
            totals += figures.double().sum(1).cpu()
            count += len(image)
        return dict(
            zip(("validation/psnr", "validation/ssim", "validation/kl"), (totals / count).tolist(), strict=True)
        )

    def draw(self, output: Path, step: int) -> None:
        """Held-out pictures (or training ones, where none are held out) above their reconstructions."""
        from ldm.image_io import grid, save_png

        image = self._some_pictures()
        decoded = self.codec.decode(self.codec.encode(image))
        rows = torch.cat([torch.cat([image[i : i + 8], decoded[i : i + 8]]) for i in range(0, len(image), 8)])
        save_png(grid(rows.cpu(), columns=min(8, len(image))), output / "samples" / f"{step:08d}.png", {})

    def export(self, output: Path, finished: bool) -> None:
        """The autoencoder's averaged weights with measured shift and scale, as a native checkpoint."""
        model = self.config.model
        shift, scale = (model.shift, model.scale) if self.config.decoder_only else self.measure()
        print(f"latents     shift {[f'{v:.4f}' for v in shift]}, scale {[f'{v:.4f}' for v in scale]}", flush=True)
        model = dataclasses.replace(model, shift=tuple(shift), scale=tuple(scale))
        config = ModelConfig(autoencoder=model, image_size=self.config.data.size)
        native.save(output, config, {"autoencoder": self.autoencoder})

    def measure(self) -> tuple[list[float], list[float]]:
        """Shift and scale of each channel over the first `scale_samples` training pictures of the order.

        With posterior N(m, s^2) at each place, a channel's mean is E[m] and its variance Var[m] + E[s^2].
        """
        count, values, total, squares = 0, 0, 0.0, 0.0
        config = dataclasses.replace(self.config.data, workers=0)
        for batch in Loader(config, self.config.loop.global_batch, 0, 1, self.config.loop.seed):
            posterior = self.codec.posterior(batch.image.to(self.device))
            mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
            total = total + mean.sum((0, 2, 3))
            squares = squares + (mean.square() + variance).sum((0, 2, 3))
            count += len(batch.key)
            values += mean[:, 0].numel()  # of each channel; a batch has the size of its bucket
            if count >= self.config.scale_samples:
                break
        mean = torch.as_tensor(total) / values
        deviation = (torch.as_tensor(squares) / values - mean.square()).sqrt()
        return mean.tolist(), (1 / deviation).tolist()

    def _some_pictures(self) -> Tensor:
        size = self.config.loop.global_batch
        source = iter(
            validation_batches(self.config.data, SHOWN)
            if self.config.data.validation
            else Loader(dataclasses.replace(self.config.data, workers=0), size, 0, 1, self.config.loop.seed)
        )
        return next(source).image[:SHOWN].to(self.device)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures or latents (B, C, H, W) at another size, by an antialiased bilinear filter, in float32."""
    return F.interpolate(x.float(), size, mode="bilinear", antialias=True).to(x)


def _autoencoder_of(config: AutoencoderTraining, said: Collection[str], device: torch.device) -> Codec | None:
    """That of the model at `config.init`. Raises UserError if it has none, or if settings say that it is another."""
    if not config.init:
        if config.decoder_only:
            raise UserError("decoder_only leaves the encoder of init as it is, and init names none; set init=PATH")
        return None
    codec = open_checkpoint(config.init).only("autoencoder").load("autoencoder", device)
    if codec.autoencoder is None:
        raise UserError(f"the model {config.init} draws pixels and has no autoencoder to train; leave out init")
    for field in dataclasses.fields(AutoencoderConfig):
        value, own = getattr(config.model, field.name), getattr(codec.config, field.name)
        if value != own and (value != getattr(UNSCALED, field.name) or f"model.{field.name}" in said):
            raise UserError(
                f"model.{field.name} is {value}, and that of the model {config.init} is {own}; leave it out"
            )
    return codec
