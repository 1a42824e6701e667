"""LatentDiffusion, a Model that draws. Its methods are one-liners over generate.py.

torch is imported when a model is loaded, not when this module is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import edits
from ldm.errors import UserError
from ldm.given import begin_of, numbers, plan_of, requests_of, start_of
from ldm.helpers import helpers_of
from ldm.jobs import Settings
from ldm.jobs.adapters import Adapter, path_of
from ldm.jobs.request import Labels
from ldm.jobs.values import real
from ldm.model import CheckpointNotice, Model
from ldm.notices import tell

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.given import Grid, Guide, Network, Prompts
    from ldm.given import Noise as NoiseOf
    from ldm.inputs import Picture
    from ldm.inverted import Inverted
    from ldm.sampling import Sampler, Step


@dataclass(frozen=True, eq=False)
class LatentDiffusion(Model):
    """A text-to-picture model, ready to draw. What a plan names beside it is opened once and kept."""

    invert = edits.invert
    attention_maps = edits.attention_maps
    prompt_to_prompt = edits.prompt_to_prompt

    @classmethod
    def of(cls, model: Model) -> LatentDiffusion:
        """The same model, able to draw."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(Model)})

    def txt2img(
        self,
        prompt: Prompts = "",
        *,
        label: Labels = None,
        negative: Prompts = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        batch_size: int = 4,
        start: Inverted | None = None,
        grid: Grid | None = None,
        guide: Guide | None = None,
        noise: NoiseOf | None = None,
        network: Network | None = None,
        latents: Tensor | None = None,
        settings: Settings | None = None,
    ) -> Tensor:
        """`n` pictures of each prompt, prompt by prompt: (B, 3, H, W), float32 in [-1, 1], on the CPU.

        `label`: of a model with classes, a name or number; one for all prompts or for each, or several for one prompt.
        Picture i has seed + i, whatever the batch size; or a seed for each is given, and a negative for each prompt.
        `start`: what `invert` found, one for each picture or one for all, in place of the seeds' noise; the settings
        are then its own, unless others are given.
        `settings` has everything else that there is to choose; what is given beside it goes before what it says.

        What has a name may be given as a value: a `prompt` and a `negative` as a Condition (of B rows, or one), a
        `sampler` (sampling.Sampler), a `grid` (its name, its levels, or a function of schedule and steps), a `guide`
        (Branches of prompt and negative -> Denoiser), a `network` (diffusion.Network, or a function of x, t and the
        condition). `noise`: (B, C, h, w) unit normals in the place of the seeds', or a class like
        sampling.NoiseStream. `latents`: (B, C, h, w), noised to the grid's first level. Raises UserError.
        """
        from ldm import generate

        requests = requests_of(prompt, negative, seed, n, label, noise)
        begin = start_of(start, latents, len(requests), sampler, noise)
        plan = plan_of(settings, cfg, steps, sampler, grid, guide, noise, network, self.config.drawing, start)
        helpers = helpers_of(self, plan)
        tell(self, requests, plan, helpers)
        return generate.draw(self, requests, plan, helpers, batch_size, begin)

    def img2img(
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: Prompts = "",
        *,
        label: Labels = None,
        strength: float | Sequence[float] = 0.75,
        mask: Picture | Sequence[Picture] | None = None,
        depth: Picture | Sequence[Picture] | None = None,
        negative: Prompts = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        batch_size: int = 4,
        grid: Grid | None = None,
        guide: Guide | None = None,
        noise: NoiseOf | None = None,
        network: Network | None = None,
        latents: Tensor | None = None,
        settings: Settings | None = None,
    ) -> Tensor:
        """`image` drawn again after `prompt`: (B, 3, H, W), float32 in [-1, 1], on the CPU; as `txt2img` otherwise.

        `image` and `mask` may be tensors, (B, 3, H, W) in [-1, 1] and (B, 1, H, W) in [0, 1], paths, Pillow's pictures,
        arrays of uint8, or lists of these (ldm/inputs.py). One prompt serves all pictures, one picture all prompts;
        `n` pictures of each, picture by picture.
        `strength`: in [0, 1], how far back in time it begins, in all of the steps: 0 is the autoencoder's round trip,
        0.75 keeps the composition, 1 begins from noise alone; one for all pictures or for each.
        `mask`: draw anew where it is 1 (white); where it is 0 the pixels stay as they are. One serves all pictures.
        `depth`: (B, 1, H', W') of any scale, larger is nearer, or what a mask may be; for networks that take it.
        `latents`: (B, C, h, w), in the place of `image`.
        """
        import torch

        from ldm import generate

        begin, requests = begin_of(image, latents, prompt, negative, label, seed, noise, mask, depth, n)
        strengths = numbers(strength, len(requests), "strengths")
        plan = plan_of(settings, cfg, steps, sampler, grid, guide, noise, network, self.config.drawing)
        helpers = helpers_of(self, plan)
        tell(self, requests, plan, helpers, begin.notices(self))
        begin.shape(self, plan, len(requests))  # as many of both, and of a size that fits
        drawn: dict[int, Tensor] = {}
        for value in dict.fromkeys(strengths):  # each has levels of its own, so pictures of one are drawn together
            rows = [i for i, other in enumerate(strengths) if other == value]
            own = replace(begin.rows(rows), strength=value)
            pictures = generate.draw(self, [requests[i] for i in rows], plan, helpers, batch_size, own)
            drawn |= zip(rows, pictures, strict=True)
        return torch.stack([drawn[i] for i in range(len(requests))])

    def sample_img2img(
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: Prompts = "",
        *,
        label: Labels = None,
        strength: float = 0.75,
        mask: Picture | Sequence[Picture] | None = None,
        depth: Picture | Sequence[Picture] | None = None,
        negative: Prompts = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        grid: Grid | None = None,
        guide: Guide | None = None,
        noise: NoiseOf | None = None,
        network: Network | None = None,
        latents: Tensor | None = None,
        settings: Settings | None = None,
    ) -> Iterator[Step]:
        """What `img2img` does, in one batch, step by step; `decode` shows one, of all that f divides and without the
        mask. Raises UserError, at the first step."""
        from ldm import generate

        begin, requests = begin_of(image, latents, prompt, negative, label, seed, noise, mask, depth, n)
        strengths = numbers(strength, len(requests), "strengths")
        plan = plan_of(settings, cfg, steps, sampler, grid, guide, noise, network, self.config.drawing)
        if len(set(strengths)) > 1:
            raise UserError("pictures of one batch walk the same levels; give them one strength")
        helpers = helpers_of(self, plan)
        tell(self, requests, plan, helpers, begin.notices(self))
        yield from generate.sample(self, requests, plan, helpers, replace(begin, strength=strengths[0]))

    def sample(
        self,
        prompt: Prompts = "",
        *,
        label: Labels = None,
        negative: Prompts = "",
        cfg: float | None = None,
        steps: int | None = None,
        sampler: str | Sampler | None = None,
        seed: int | Sequence[int] = 0,
        n: int = 1,
        start: Inverted | None = None,
        grid: Grid | None = None,
        guide: Guide | None = None,
        noise: NoiseOf | None = None,
        network: Network | None = None,
        latents: Tensor | None = None,
        settings: Settings | None = None,
    ) -> Iterator[Step]:
        """What `txt2img` does, in one batch, step by step; `decode` shows one. Raises UserError, at the first step."""
        from ldm import generate
        from ldm.start import Noise

        requests = requests_of(prompt, negative, seed, n, label, noise)
        begin = start_of(start, latents, len(requests), sampler, noise) or Noise()
        plan = plan_of(settings, cfg, steps, sampler, grid, guide, noise, network, self.config.drawing, start)
        helpers = helpers_of(self, plan)
        tell(self, requests, plan, helpers)
        yield from generate.sample(self, requests, plan, helpers, begin)

    def decode(self, step: Step, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`; `tile` is Settings'.

        Raises UserError if they are not finite."""
        from ldm import generate

        return generate.decode(self, step, tile)

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> LatentDiffusion:
        """The model on `device` ("cuda:1") and in the precision `dtype` ("fp16", torch.float16), each as it is if None.

        As torch's modules do, its networks move themselves, and with them those of models that share them. The networks
        of a model that saves memory rest where they are. Raises UserError for what is not there.
        """
        from ldm.device import PRECISIONS, choose_device, choose_precision

        where = None if device is None else choose_device(str(device))
        if self.path is None and dtype is not None:
            _ = self.hash  # of the weights as they were, whatever precision they run in
        kind = None
        if dtype is not None:
            name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
            kind = choose_precision(
                {long: short for short, long in PRECISIONS.items()}.get(name, name), where or self.device
            )
        rests = self.works_on is not None
        for network in (self.encoder, self.unet, self.codec):
            network.to(device=None if rests else where, dtype=kind)
        made = replace(self, works_on=where or self.works_on) if rests else self
        made.kept.pop("helpers", None)  # they are elsewhere
        return made

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
        files = [Adapter("lora", path_of(path), real(scale, f"the scale of {path}")) for path, scale in scales.items()]
        made = use.apply(self, files + [Adapter("embedding", str(path)) for path in _files(embeddings)])
        for notice in made.told[len(self.told) :]:
            warnings.warn(notice, CheckpointNotice, stacklevel=2)
        return made


def _files(given: Sequence[str | Path] | str | Path) -> Sequence[str | Path]:
    return [given] if isinstance(given, str | Path) else given
