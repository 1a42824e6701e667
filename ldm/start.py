"""Where a trajectory starts: nothing but noise, or a picture. Ways to draw differ in this alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioning.planes import depth_plane, inpainting_planes, kind_of_planes
from ldm.diffusion import Denoiser
from ldm.errors import UserError
from ldm.guidance import keep, windows
from ldm.inputs import check_depths, check_images, check_masks
from ldm.jobs import Plan
from ldm.jobs.plan import Reuse
from ldm.jobs.values import real
from ldm.model_config import UNetConfig
from ldm.sampling import Sampler, start, weakened
from ldm.sampling.noise import Draws
from ldm.sampling.step import solver_state

if TYPE_CHECKING:
    from ldm.model import Model

Placed = tuple[Tensor, Tensor, Denoiser] | tuple[Tensor, Tensor, Denoiser, Sampler]
"""The state x (B, C, h, w), the grid from its level on, and the denoiser that takes it from there; fourth the sampler,
where it is not the plan's."""


@dataclass(frozen=True)
class Noise:
    """Nothing but noise."""

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents; raises UserError for a size that f does not divide."""
        side = model.config.image_size
        return model.codec.latent_shape(plan.height or side, plan.width or side)

    def notices(self, model: Model) -> tuple[str, ...]:
        """What a user should know of the start."""
        return ()

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None:
        """What the network takes beside `count` latents of `shape`; None for most networks.

        An inpainting network draws all of a grey picture. Raises UserError for one that takes what is not given.
        """
        if _takes(model) != "mask":
            return _no_planes(model)
        _, h, w = shape
        image = torch.zeros(count, 3, h * model.codec.factor, w * model.codec.factor, device=model.device)
        return inpainting_planes(model.codec, image, torch.ones_like(image[:, :1]))

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed:
        return start(noise.initial(), model.law.schedule, sigmas), sigmas, denoiser


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, noised to the level that `strength` means, and drawn from there in all of the plan's steps.

    `image`: (B, 3, H, W) in [-1, 1], one for each request; H and W of any size that the U-Net can halve.
    `strength`: in [0, 1], see sampling.weakened. At 0 nothing but the autoencoder touches the picture; at 1 it begins
        from noise alone, and without a mask that is `Noise`, bit for bit.
    `mask`: (B, 1, H, W) in [0, 1], 1 where the picture is drawn anew and 0 where it stays; None draws all of it.
    `depth`: (B, 1, H', W') of any scale, larger is nearer, for networks that take it.
    `window`: pixels; the network sees so much at a time, in windows that overlap by half. None: all of it at once.

    Where f (and a patch) does not divide a side the picture is continued by its reflection, which `paste` takes off.
    Raises UserError for anything else; `inputs` makes these of all that may be given.
    """

    image: Tensor
    strength: float = 0.75
    mask: Tensor | None = None
    depth: Tensor | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        real(self.strength, "the strength")
        check_images(self.image)
        if self.mask is not None:
            check_masks(self.mask, self.image)
        if self.depth is not None:
            check_depths(self.depth, len(self.image))

    def rows(self, rows: slice | list[int]) -> Picture:
        """Those of some of the pictures."""
        mask, depth = (None if part is None else part[rows] for part in (self.mask, self.depth))
        return replace(self, image=self.image[rows], mask=mask, depth=depth)

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]:
        """That of its latent. Raises UserError unless there is one for each request, of the size that is asked for."""
        if len(self.image) != count:
            raise UserError(
                f"{len(self.image)} pictures to begin from were given for {count} prompts; give as many of both, or "
                "one of either"
            )
        height, width = self.image.shape[2:]
        for name, asked, side in (("width", plan.width, width), ("height", plan.height, height)):
            if asked not in (None, side):
                raise UserError(
                    f"settings.{name} is {asked}, and the picture to begin from is {width} x {height} pixels, which is "
                    "the size of what is drawn; leave it out, or resize the picture"
                )
        grain = _grain(model, height, width)
        if self.window is not None:
            check_window(plan, self.window, (height, width))
            if self.window % grain:
                raise UserError(f"a window of {self.window} pixels does not fit; choose a multiple of {grain}")
            _grain(model, self.window, self.window, "the window")
            if model.extra_channels:
                raise UserError(
                    f"the U-Net of {model.name or 'this model'} takes {model.extra_channels} channels beside the "
                    "latent, which is not drawn in windows; use a model without them"
                )
        return model.codec.latent_shape(*_multiples(height, width, grain))

    def notices(self, model: Model) -> tuple[str, ...]:
        """What a user should know of how the picture is taken. Raises UserError for one that is too small."""
        height, width = self.image.shape[2:]
        grain = _grain(model, height, width)
        drawn_height, drawn_width = _multiples(height, width, grain)
        if (drawn_height, drawn_width) == (height, width):
            return ()
        return (
            f"the picture is {width} x {height} pixels, and sides are multiples of {grain}: it is drawn "
            f"at {drawn_width} x {drawn_height}, continued by its reflection, and cropped back",
        )

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None:
        """As `Noise.planes`: an inpainting network is given the picture and its mask, a depth network the depth."""
        takes = _takes(model)
        if self.depth is not None and takes != "depth":
            raise UserError(f"the U-Net of {model.name or 'this model'} takes no depth map; leave it out")
        if takes == "mask":
            image = _continued(self.image, model)
            mask = torch.ones_like(image[:, :1]) if self.mask is None else _continued(self.mask, model)
            return inpainting_planes(model.codec, image, mask)
        if takes == "depth" and self.depth is not None:
            same = self.depth.shape[2:] == self.image.shape[2:]
            return depth_plane(_continued(self.depth, model) if same else self.depth.to(model.device), shape[1:])
        return _no_planes(model)

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed:
        codec, strength = model.codec, float(self.strength)
        sigmas = weakened(model.law.schedule, sigmas, strength)
        if self.window is not None:
            side = self.window // codec.factor
            denoiser = windows(denoiser, side, side // 2)
        kept = self.mask is not None and planes is None
        if strength == 1 and not kept:
            return start(noise.initial(), model.law.schedule, sigmas), sigmas, denoiser
        latent = latent_of(model, plan, self.image)
        if kept and self.mask is not None:  # what a mask touches at all is drawn
            denoiser = keep(denoiser, latent, F.max_pool2d(_continued(self.mask, model), codec.factor))
        if strength == 1:
            return start(noise.initial(), model.law.schedule, sigmas), sigmas, denoiser
        return solver_state(latent) + float(sigmas[0]) * noise.initial(), sigmas, denoiser

    def paste(self, drawn: Tensor) -> Tensor:
        """`drawn` at the picture's own size (B, 3, H, W), with its own pixels outside the mask, as they were given."""
        drawn = drawn[..., : self.image.shape[2], : self.image.shape[3]]
        if self.mask is None:
            return drawn
        mask = self.mask.cpu()
        return mask * drawn + (1 - mask) * self.image.cpu()


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents (B, C, h, w) of unit variance, as `Codec.encode` makes them, noised to the grid's first level.

    `strength`: as a Picture's, 1 from noise alone; None: all of the grid, with the latents in its noise.
    Raises UserError for what is none.
    """

    latents: Tensor
    strength: float | None = None

    def __post_init__(self) -> None:
        given = self.latents
        if not isinstance(given, Tensor) or given.ndim != 4 or not given.is_floating_point():
            raise UserError(f"latents are a tensor of floats (B, C, h, w), and {given!r:.60} was given")
        if not bool(given.isfinite().all()):
            raise UserError("the latents have values that are not finite; look at how they were made")

    def rows(self, rows: slice | list[int]) -> Latents:
        return replace(self, latents=self.latents[rows])

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]:
        channels, (height, width), f = model.codec.latent_channels, self.latents.shape[2:], model.codec.factor
        sides = {(plan.height or height * f, plan.width or width * f)}
        if len(self.latents) != count or self.latents.shape[1] != channels or sides != {(height * f, width * f)}:
            raise UserError(
                f"latents of {tuple(self.latents.shape)} were given for {count} pictures; the model takes ({count}, "
                f"{channels}, height / {f}, width / {f}), of the size that is asked for, if one is"
            )
        return channels, height, width

    def notices(self, model: Model) -> tuple[str, ...]:
        return ()

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None:
        return Noise().planes(model, shape, count)

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed:
        if self.strength is not None:
            sigmas = weakened(model.law.schedule, sigmas, float(self.strength))
        if self.strength == 1:
            return start(noise.initial(), model.law.schedule, sigmas), sigmas, denoiser
        latents = solver_state(self.latents.to(model.device))
        return latents + float(sigmas[0]) * noise.initial(), sigmas, denoiser

    def paste(self, drawn: Tensor) -> Tensor:
        return drawn


def check_window(plan: Plan, window: int, size: tuple[int, int]) -> None:
    """Raises UserError where a picture of `size` takes several windows: what reuse keeps of one is not the next's."""
    if window < max(size) and any(isinstance(each, Reuse) for each in plan.shortcuts):
        raise UserError(
            f"a window of {window} pixels moves over the picture at each step, and what reuse keeps is of one place; "
            f"leave out reuse, or choose a window of {max(size)} pixels or more"
        )


def latent_of(model: Model, plan: Plan, image: Tensor) -> Tensor:
    """(B, C, h, w) of pictures of any size, in the plan's tiles."""
    codec, image = model.codec, _continued(image, model)
    if plan.tile is None:
        return codec.encode(image)
    return codec.encode_tiled(image, plan.tile, codec.overlap(plan.tile))


class Start(Protocol):
    """What `generate.sample` asks of a start; those above are three."""

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]: ...

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None: ...

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed: ...


class Pictures(Start, Protocol):
    """A start of one picture for each request, which `generate.draw` takes batch by batch."""

    def rows(self, rows: slice) -> Pictures: ...

    def paste(self, drawn: Tensor) -> Tensor: ...


def _grain(model: Model, height: int, width: int, what: str = "the picture") -> int:
    """What the sides of what is drawn are multiples of: f, or a transformer's patch.

    Raises UserError for one (`what`) so small that nothing is left of it on a U-Net's deepest level.
    """
    f, config = model.codec.factor, model.unet.config
    if isinstance(config, UNetConfig):
        grain, least = f, f * 2 ** (len(config.multipliers) - 1)
    else:
        grain = least = f * config.patch
    if min(height, width) < least:
        raise UserError(f"{what} is {width} x {height} pixels; choose one of {least} or more either way")
    return grain


def _multiples(height: int, width: int, factor: int) -> tuple[int, int]:
    """The sides, each at the next multiple of `factor`."""
    return -(-height // factor) * factor, -(-width // factor) * factor


def _continued(plane: Tensor, model: Model) -> Tensor:
    """(B, C, H, W) on the model's device, continued by its reflection to multiples of f."""
    height, width = plane.shape[2:]
    down, across = _multiples(height, width, _grain(model, height, width))
    return F.pad(plane.to(model.device), (0, across - width, 0, down - height), mode="reflect")


def _takes(model: Model) -> str:
    return kind_of_planes(model.extra_channels, model.codec.latent_channels)


def _no_planes(model: Model) -> None:
    """None, for a network that takes no planes; raises UserError for another."""
    if model.extra_channels:
        depth = _takes(model) == "depth"
        what = "a depth map, which img2img takes as depth=" if depth else "and what they mean is unknown"
        raise UserError(
            f"the U-Net of {model.name or 'this model'} takes {model.extra_channels} channels beside the latent, {what}"
            f"; give it, or draw with a model that takes {model.codec.latent_channels}"
        )
