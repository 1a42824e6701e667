"""The library: LatentDiffusion, a Model that draws. Its methods are one-liners over generate.py.

torch is imported when a model is loaded, not when this module is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.helpers import NONE, Helpers, open_helpers
from ldm.jobs import Plan, Request, Settings, of_prompts
from ldm.jobs.adapters import Adapter
from ldm.jobs.request import Labels
from ldm.jobs.values import real
from ldm.loading import load_model
from ldm.model import CheckpointNotice, Model
from ldm.model import assemble as assemble_model

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.autoencoder.codec import Codec
    from ldm.conditioning.clip import TextTower
    from ldm.config import ModelConfig
    from ldm.inputs import Picture
    from ldm.inverted import Inverted
    from ldm.networks import AnyNetwork
    from ldm.sampling import Step
    from ldm.unet.maps import Maps


INVERSION = Settings(sampler="dpmpp_2m", cfg=1.0)


class PromptNotice(UserWarning):
    """A prompt has words that the text tower does not read or does not know; the message names them."""


class PictureNotice(UserWarning):
    """A picture is not drawn just as it was given; the message says how."""


@dataclass(frozen=True, eq=False)
class LatentDiffusion(Model):
    """A text-to-picture model, ready to draw. What a plan names beside it is opened once and kept."""

    @classmethod
    def of(cls, model: Model) -> LatentDiffusion:
        """The same model, able to draw."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(Model)})

    @cached_property
    def _opened(self) -> dict[str, Helpers]:
        return {"last": NONE}

    def _helpers(self, plan: Plan) -> Helpers:
        self._opened["last"] = helpers = open_helpers(self, plan, self._opened["last"])
        return helpers

    def _tell(self, requests: Sequence[Request], plan: Plan, helpers: Helpers, of_start: Sequence[str] = ()) -> None:
        from ldm import generate

        for notice in of_start:
            warnings.warn(notice, PictureNotice, stacklevel=3)
        for reader in (self, *helpers.models.values()):
            for notice in generate.prompt_notices(reader, requests, plan.weighted):
                warnings.warn(notice, PromptNotice, stacklevel=3)

    def txt2img(
        self,
        prompt: str | Sequence[str] = "",
        *,
        label: Labels = None,
        negative: str | Sequence[str] = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        batch_size: int = 4,
        start: Inverted | None = None,
        settings: Settings | None = None,
    ) -> Tensor:
        """`n` pictures of each prompt, prompt by prompt: (B, 3, H, W), float32 in [-1, 1], on the CPU.

        `label`: of a model with classes, a name or number; one for all prompts or for each, or several for one prompt.
        Picture i has seed + i, whatever the batch size; or a seed for each is given, and a negative for each prompt.
        `start`: what `invert` found, one for each picture or one for all, in place of the seeds' noise; the settings
        are then its own, unless others are given.
        `settings` has everything else that there is to choose; `cfg`, `steps` and `sampler` go before what it says of
        them. Raises UserError.
        """
        from ldm import generate
        from ldm.inverted import begin_of

        requests = of_prompts(prompt, negative, seed, n, label)
        begin, plan = begin_of(start, len(requests)), _plan(_settings(settings, start), cfg, steps, sampler)
        helpers = self._helpers(plan)
        self._tell(requests, plan, helpers)
        return generate.draw(self, requests, plan, helpers, batch_size, begin)

    def img2img(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        *,
        label: Labels = None,
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
        `strength`: in [0, 1], how far back in time it begins, in all of the steps: 0 is the autoencoder's round trip,
        0.75 keeps the composition, 1 begins from noise alone.
        `mask`: draw anew where it is 1 (white); where it is 0 the pixels stay as they are. One serves all pictures.
        `depth`: (B, 1, H', W') of any scale, larger is nearer, or what a mask may be; for networks that take it.
        """
        from ldm import generate, start
        from ldm.inputs import as_depths, as_images, as_masks

        images, requests = _for_each(as_images(image), prompt, negative, label, seed)
        masks = None if mask is None else as_masks(mask, images)
        depths = None if depth is None else as_depths(depth, len(images))
        picture = start.Picture(images, strength, masks, depths)
        plan = _plan(settings, cfg, steps, sampler)
        helpers = self._helpers(plan)
        self._tell(requests, plan, helpers, picture.notices(self))
        return generate.draw(self, requests, plan, helpers, batch_size, picture)

    def sample(
        self,
        prompt: str | Sequence[str] = "",
        *,
        label: Labels = None,
        negative: str | Sequence[str] = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        start: Inverted | None = None,
        settings: Settings | None = None,
    ) -> Iterator[Step]:
        """What `txt2img` does, in one batch, step by step; `decode` shows one. Raises UserError, at the first step."""
        from ldm import generate
        from ldm.inverted import begin_of
        from ldm.start import Noise

        requests = of_prompts(prompt, negative, seed, n, label)
        begin, plan = begin_of(start, len(requests)), _plan(_settings(settings, start), cfg, steps, sampler)
        helpers = self._helpers(plan)
        self._tell(requests, plan, helpers)
        yield from generate.sample(self, requests, plan, helpers, begin or Noise())

    def decode(self, step: Step, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`; `tile` is Settings'.

        Raises UserError if they are not finite."""
        from ldm import generate

        return generate.decode(self, step, tile)

    def invert(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        *,
        label: Labels = None,
        negative: str | Sequence[str] = "",
        strength: float = 1.0,
        refinements: int = 1,
        exact: bool = False,
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        batch_size: int = 4,
        settings: Settings = INVERSION,
    ) -> Inverted:
        """What `image`, told `prompt`, is drawn from: a `start` for `txt2img` and `sample`, by this or another prompt.
        Images and prompts are those of `img2img`, `strength` says up to which level of noise.

        `sampler`: any that draws no noise on its way. `refinements`: how often what the way up and down misses is sent
        up too, two more walks each. `exact`: by EDICT, whose way back meets the picture's latent to rounding at any
        cfg, in twice the evaluations and with a sampler of its own. Raises UserError.
        """
        from ldm import inverted, start
        from ldm.inputs import as_images

        images, requests = _for_each(as_images(image), prompt, negative, label, 0)
        if exact and sampler is not None:
            raise UserError("an exact inversion has a sampler of its own; leave the sampler out, or exact")
        settings = _settings(settings, None).but(cfg, steps, sampler)
        plan, picture = settings.plan(), start.Picture(images, strength)
        helpers = self._helpers(plan)
        self._tell(requests, plan, helpers, picture.notices(self))
        return inverted.invert(self, requests, settings, helpers, picture, refinements, exact, batch_size)

    def attention_maps(self, size: int = 32) -> AbstractContextManager[Maps]:
        """`with model.attention_maps() as maps:` keeps what the U-Net looks at of the prompt, in all that is drawn
        inside, by layer, evaluation and token, in layers of at most `size` x `size` positions. No bit of a
        picture changes. Raises UserError for a network without cross-attention.
        """
        from ldm.unet.maps import attention_maps

        return attention_maps(self.unet, self.text, size)

    def prompt_to_prompt(
        self,
        source: str,
        target: str,
        weights: Mapping[str, float] | None = None,
        cross: float = 0.8,
        itself: float = 0.4,
    ) -> AbstractContextManager[None]:
        """`with model.prompt_to_prompt(source, target):` draws [source, target], in one batch and from one seed, so
        that the second is the first one with other words (ldm/unet/prompt_to_prompt.py has the arguments). UserError.
        """
        from ldm.unet.prompt_to_prompt import prompt_to_prompt

        return prompt_to_prompt(self.unet, self.text, source, target, weights, cross, itself)

    def adapted(
        self,
        loras: Mapping[str | Path, float] | Sequence[str | Path] | str | Path | None = None,
        embeddings: Sequence[str | Path] | str | Path = (),
    ) -> LatentDiffusion:
        """This model with LoRAs (file -> scale) merged into its networks, and the words of textual inversions.

        One file may be given without a list, and LoRAs without scales, which are then 1.

        This one stays as it is, and shares with the new one all weights that no LoRA changes. A CheckpointNotice says
        which words were loaded, and which file was made for another model. UserError for files that cannot be read or
        do not fit.
        """
        from ldm.adapters import use

        scales = loras if isinstance(loras, Mapping) else dict.fromkeys(_files(loras or ()), 1.0)
        files = [Adapter("lora", str(path), real(scale, f"the scale of {path}")) for path, scale in scales.items()]
        made = use.apply(self, files + [Adapter("embedding", str(path)) for path in _files(embeddings)])
        for notice in made.told[len(self.told) :]:
            warnings.warn(notice, CheckpointNotice, stacklevel=2)
        return made


def _files(given: Sequence[str | Path] | str | Path) -> Sequence[str | Path]:
    return [given] if isinstance(given, str | Path) else given


def load(
    model: str | Path = "icons",
    device: str = "auto",
    precision: str = "auto",
    *,
    vae: str | Path | None = None,
    weights: str = "auto",
    settings: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    backend: str = "auto",
    low_memory: bool = False,
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
        backend: what runs the networks (ldm/backends): auto, the fastest that needs no preparation; torch, layer by
            layer as it trains; compile, the U-Net by torch.compile. What is drawn is the same to rounding.
        low_memory: run the networks on one picture and one branch of guidance at a time, and keep them on the CPU while
            they do not work. What is drawn is the same to rounding (docs/memory.md).

    Raises:
        UserError: what is not there, damaged, of another architecture, or not a text-to-picture model.
    """
    made = LatentDiffusion.of(
        load_model(
            model,
            device,
            precision,
            vae=vae,
            weights=weights,
            settings=settings,
            attention=attention,
            backend=backend,
            low_memory=low_memory,
        )
    )
    for notice in made.notices:
        warnings.warn(notice, CheckpointNotice, stacklevel=2)
    return made


def assemble(
    config: ModelConfig,
    codec: Codec,
    towers: Mapping[str, TextTower],
    unet: AnyNetwork,
    name: str = "",
    path: Path | None = None,
) -> LatentDiffusion:
    """`model.assemble`, able to draw."""
    return LatentDiffusion.of(assemble_model(config, codec, towers, unet, name, path))


def _for_each(
    images: Tensor,
    prompt: str | Sequence[str],
    negative: str | Sequence[str],
    label: Labels,
    seed: int | Sequence[int],
) -> tuple[Tensor, list[Request]]:
    """As many pictures as requests: one prompt serves all pictures, one picture all prompts."""
    requests = of_prompts([prompt] * len(images) if isinstance(prompt, str) else prompt, negative, seed, label=label)
    return images.expand(len(requests), -1, -1, -1) if len(images) == 1 else images, requests


def _settings(given: Settings | None, start: Inverted | None) -> Settings:
    settings = given if given is not None else Settings() if start is None else start.settings
    if not isinstance(settings, Settings):
        raise UserError(f"settings is {settings!r:.60}; give a ldm.jobs.Settings, or leave it out")
    return settings


def _plan(settings: Settings, cfg: float | None, steps: int | None, sampler: str | None) -> Plan:
    return _settings(settings, None).but(cfg, steps, sampler).plan()
