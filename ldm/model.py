"""LatentDiffusion: everything that a picture is drawn with, in one record. Its methods are one-liners over generate.py.

torch is imported when a model is loaded, not when this module is.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import ModelConfig, ScheduleConfig, changed
from ldm.errors import UserError
from ldm.find import find
from ldm.jobs import Settings, of_prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.adapters.record import Adapter
    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints.record import Checkpoint
    from ldm.conditioning.clip import TextTower
    from ldm.conditioning.encoder import Encoder
    from ldm.diffusion import Law
    from ldm.inputs import Picture
    from ldm.sampling import Step
    from ldm.unet.unet import UNet


class CheckpointNotice(UserWarning):
    """Something that a checkpoint does not say was assumed, or something in it passed over; the message says what."""


@dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """A text-to-picture model. `name` and `path` say where it came from; a model assembled in memory has no path.

    `vae` and `settings` are what `load` was given of them: a picture's recipe needs them beside the name. `told` is
    what there is to know of its adapters.
    """

    config: ModelConfig
    codec: Codec
    encoder: Encoder
    unet: UNet
    law: Law
    name: str = ""
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    told: tuple[str, ...] = ()
    vae: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know before trusting the pictures: what was assumed of a foreign checkpoint, which words
        its adapters brought."""
        return (*(self.checkpoint.notices if self.checkpoint is not None else ()), *self.told)

    @property
    def extra_channels(self) -> int:
        """Channels that the U-Net takes beside the noisy latent's: 5 of an inpainting model, 1 of a depth model."""
        return self.unet.config.in_channels - self.codec.latent_channels

    @property
    def text(self) -> TextTower | None:
        """The tower that reads captions; None of a model that takes none."""
        return self.encoder.text

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def precision(self) -> torch.dtype:
        """What the U-Net computes in; the sampler's state is float64 (float32 on mps) whatever this is."""
        return self.unet.dtype

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of the config's settings that are not the defaults, and of the stored weights, whatever
        precision they run in here."""
        from ldm.checkpoints import native

        if self.path is not None and self.checkpoint is not None:
            weights = native.fingerprint(self.checkpoint.tensors())
        else:
            parts = {"autoencoder": self.codec.autoencoder, "text": self.text, "unet": self.unet}
            weights = "".join(native.fingerprint(part) for part in parts.values() if part is not None)
        document = json.dumps(changed(self.config), sort_keys=True)  # a setting added later changes no old model
        return hashlib.sha256(f"{document}\n{weights}".encode()).hexdigest()

    def txt2img(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        batch_size: int = 4,
        settings: Settings = Settings(),
    ) -> Tensor:
        """`n` pictures of each prompt, prompt by prompt: (B, 3, H, W), float32 in [-1, 1], on the CPU.

        Picture i has seed + i, whatever the batch size; or a seed for each is given, and a negative for each prompt.
        `settings` has everything else that there is to choose; `cfg`, `steps` and `sampler` go before what it says of
        them. Raises UserError.
        """
        from ldm import generate

        requests = of_prompts(prompt, negative, seed, n)
        return generate.draw(self, requests, settings.but(cfg, steps, sampler), batch_size)

    def img2img(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str],
        *,
        strength: float = 0.75,
        mask: Picture | Sequence[Picture] | None = None,
        depth: Picture | Sequence[Picture] | None = None,
        negative: str | Sequence[str] = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 4,
        settings: Settings = Settings(),
    ) -> Tensor:
        """`image` drawn again after `prompt`: (B, 3, H, W), float32 in [-1, 1], on the CPU; as `txt2img` otherwise.

        `image` and `mask` may be tensors, (B, 3, H, W) in [-1, 1] and (B, 1, H, W) in [0, 1], paths, Pillow's pictures,
        arrays of uint8, or lists of these (ldm/inputs.py). One prompt serves all pictures, one picture all prompts.
        `strength`: in (0, 1], the share of the steps that are walked: 0.75 keeps the composition, 1 hardly anything.
        `mask`: draw anew where it is 1 (white); where it is 0 the pixels stay as they are. One serves all pictures.
        `depth`: (B, 1, H', W') of any scale, larger is nearer, or what a mask may be; for networks that take it.
        """
        from ldm import generate
        from ldm.inputs import as_depths, as_images, as_masks

        images = as_images(image)
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        requests = of_prompts(prompts, negative, seed)
        if len(images) == 1:
            images = images.expand(len(requests), -1, -1, -1)
        masks = None if mask is None else as_masks(mask, images)
        depths = None if depth is None else as_depths(depth, len(images))
        begin = generate.Begin(images, strength, masks, depths)
        return generate.draw(self, requests, settings.but(cfg, steps, sampler), batch_size, begin)

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        settings: Settings = Settings(),
    ) -> Iterator[Step]:
        """What `txt2img` does, in one batch, step by step; `decode` shows one. Raises UserError at the first step."""
        from ldm import generate

        return generate.sample(self, of_prompts(prompt, negative, seed, n), settings.but(cfg, steps, sampler))

    def decode(self, step: Step, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`; `tile` is Settings'.

        Raises UserError if they are not finite."""
        from ldm import generate

        return generate.decode(self, step, tile)

    def adapted(
        self, loras: Mapping[str | Path, float] | None = None, embeddings: Sequence[str | Path] = ()
    ) -> LatentDiffusion:
        """This model with LoRAs (file -> scale) merged into its networks, and the words of textual inversions.

        This one stays as it is, and shares with the new one all weights that no LoRA changes. A CheckpointNotice says
        which words were loaded, and which file was made for another model. UserError for files that cannot be read or
        do not fit.
        """
        from ldm.adapters import use
        from ldm.adapters.record import Adapter

        files = [Adapter("lora", str(path), scale) for path, scale in (loras or {}).items()]
        made = use.apply(self, files + [Adapter("embedding", str(path)) for path in embeddings])
        for notice in made.told[len(self.told) :]:
            warnings.warn(notice, CheckpointNotice, stacklevel=2)
        return made


def load(
    model: str | Path = "icons",
    device: str = "auto",
    precision: str = "auto",
    *,
    vae: str | Path | None = None,
    weights: str = "auto",
    settings: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
) -> LatentDiffusion:
    """The model of a shipped name, a checkpoint directory or file, or a Hugging Face id, ready to draw.

    Native checkpoints, Stable Diffusion v1 and v2 in the original single file (.safetensors, .ckpt) and diffusers
    directories are read; `hf:owner/name` is fetched first. What such files do not say of themselves is assumed by the
    rules of checkpoints/architectures.py, and a CheckpointNotice warns of it.

    Args:
        device: auto, cpu, cuda, mps.
        precision: auto, fp32, fp16, bf16 (auto: fp16 on a GPU, else fp32).
        vae: a checkpoint whose autoencoder takes the place of the model's own.
        weights: of a file with two sets of U-Net weights: ema (the average), raw, or auto (the average, and says so).
        settings: what goes before all that files and rules say: {"parameterization": "v", "text.padding": "eot"}.
        attention: of the U-Net: sdpa, torch's own, or xformers, where that is installed and the device is CUDA's.

    Raises:
        UserError: what is not there, damaged, of another architecture, or not a text-to-picture model.
    """
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.device import choose_device, choose_precision
    from ldm.unet.attention import check_backend

    path = find(model)
    other = None if vae is None else find(vae)
    where = choose_device(device)
    dtype = choose_precision(precision, where)
    check_backend(attention, where.type)
    checkpoint = open_checkpoint(path, weights, settings, other)
    for notice in checkpoint.notices:
        warnings.warn(notice, CheckpointNotice, stacklevel=2)
    codec = checkpoint.load("autoencoder", where, dtype)
    text = checkpoint.load("text", where, dtype) if checkpoint.config.takes_text else None
    unet = checkpoint.load("unet", where, dtype)
    unet.set_attention_backend(attention)
    made = assemble(checkpoint.config, codec, text, unet, name=str(model), path=path)
    named = None if vae is None else str(vae)
    return replace(made, checkpoint=checkpoint, vae=named, settings=dict(settings or {}))


def assemble(
    config: ModelConfig, codec: Codec, text: TextTower | None, unet: UNet, name: str = "", path: Path | None = None
) -> LatentDiffusion:
    """A model of parts in memory; the law is made from `config`.

    The U-Net may take more channels than the latent has (inpainting, depth). Raises UserError if the parts do not fit
    each other.
    """
    from ldm.conditioning.encoder import Encoder
    from ldm.diffusion import make_law

    schedule = config.schedule or ScheduleConfig()
    law = make_law(schedule, config.parameterization, config.sigma_data, config.learned_variance)
    here, there = codec.latent_channels, unet.config.in_channels
    if here > there or here * (1 + config.learned_variance) != unet.config.out_channels:
        raise UserError(f"the autoencoder makes latents of {here} channels and the U-Net takes {there}; pair others")
    encoder = Encoder(text, config.encoder, unet.config.classes)
    width = 0 if text is None else text.config.width
    for what, made, taken in (
        ("context", width, unet.config.context_width),
        ("vector", encoder.vector_width, unet.config.vector_width),
    ):
        if made != taken:
            raise UserError(f"the {what} that is made here is {made} wide and the U-Net takes {taken}; pair others")
    return LatentDiffusion(config, codec, encoder, unet, law, name, path)
