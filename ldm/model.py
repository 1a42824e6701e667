"""Model: everything that a picture is drawn with, in one record, which knows no way to draw.

torch is imported when a model is loaded, not when this module is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, printable
from ldm.model_config import DrawingConfig, ModelConfig, ScheduleConfig
from ldm.settings import changed

if TYPE_CHECKING:
    import torch

    from ldm.autoencoder.codec import Codec
    from ldm.checkpoints.record import Checkpoint
    from ldm.conditioning.clip import TextTower
    from ldm.conditioning.encoder import Encoder
    from ldm.conditioning.t5 import T5Tower
    from ldm.diffusion.law import Law
    from ldm.jobs.adapters import Adapter
    from ldm.networks import AnyNetwork


class CheckpointNotice(UserWarning):
    """Something that a checkpoint does not say was assumed, or something in it passed over; the message says what."""


@dataclass(frozen=True, eq=False)
class Model:
    """A text-to-picture model. `name` and `path` say where it came from; a model assembled in memory has no path.

    `vae` and `settings` are what `load` was given of them: a picture's recipe needs them beside the name. `told` is
    what there is to know of its adapters.
    """

    config: ModelConfig
    codec: Codec
    encoder: Encoder
    unet: AnyNetwork
    law: Law
    name: str = ""
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    told: tuple[str, ...] = ()
    vae: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "torch"  # that runs its networks (ldm/backends)
    works_on: torch.device | None = None  # of a model that saves memory: where networks are while they work, piecewise

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know before trusting the pictures: what was assumed of a foreign checkpoint, which words
        its adapters brought."""
        return (*(self.checkpoint.notices if self.checkpoint is not None else ()), *map(printable, self.told))

    @property
    def extra_channels(self) -> int:
        """Channels that the U-Net takes beside the noisy latent's: 5 of an inpainting model, 1 of a depth model."""
        return self.unet.config.in_channels - self.codec.latent_channels

    @property
    def text(self) -> TextTower | None:
        """The first tower that reads captions; None of a model that takes none."""
        return self.encoder.text

    @property
    def towers(self) -> dict[str, TextTower]:
        """All CLIPs that read captions, by the names of their parts; `encoder.readers` has T5 too."""
        return self.encoder.named_towers

    @property
    def device(self) -> torch.device:
        """Where it works; of a model that saves memory its networks rest on the CPU."""
        return self.works_on or next(self.unet.parameters()).device

    @property
    def precision(self) -> torch.dtype:
        """What the U-Net computes in; the sampler's state is float64 (float32 on mps) whatever this is."""
        return self.unet.dtype

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What lasts from one drawing to the next: "helpers", which were opened beside it, and "onlookers", each of
        which is told of how many pictures a batch is that begins."""
        return {}

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of the config's settings that are not the defaults (but how it is meant to be drawn), and
        of the stored weights, whatever precision they run in here."""
        from ldm.checkpoints import native

        if self.path is not None and self.checkpoint is not None:
            weights = native.fingerprint(self.checkpoint.tensors())
        else:
            parts = {"autoencoder": self.codec.autoencoder, **self.encoder.weights, "unet": self.unet}
            weights = "".join(native.fingerprint(part) for part in parts.values() if part is not None)
        settings = changed(replace(self.config, drawing=DrawingConfig()))  # one added later changes no old model
        document = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(f"{document}\n{weights}".encode()).hexdigest()


def assemble(
    config: ModelConfig,
    codec: Codec,
    towers: Mapping[str, TextTower | T5Tower],
    unet: AnyNetwork,
    name: str = "",
    path: Path | None = None,
) -> Model:
    """A model of parts in memory; the law is made from `config`.

    The U-Net may take more channels than the latent has (inpainting, depth). Raises UserError if the parts do not fit
    each other.
    """
    from ldm.conditioning.encoder import Encoder
    from ldm.diffusion.law import make_law

    schedule = config.schedule or ScheduleConfig()
    law = make_law(schedule, config.parameterization, config.sigma_data, config.learned_variance)
    here, there = codec.latent_channels, unet.config.in_channels
    if here > there or here * (1 + config.learned_variance) != unet.config.out_channels:
        raise UserError(f"the autoencoder makes latents of {here} channels and the U-Net takes {there}; pair others")
    encoder = Encoder(towers, config.encoder, unet.config.classes)
    for what, made, taken in (
        ("context", encoder.context_width, unet.config.context_width),
        ("vector", encoder.vector_width, unet.config.vector_width),
    ):
        if made != taken:
            missing = ", or add the text tower that is missing" if 0 < made < taken else ""
            raise UserError(
                f"the {what} that is made here is {made} wide and the U-Net takes {taken}; pair others{missing}"
            )
    return Model(config, codec, encoder, unet, law, name, path)
