"""Prompt -> context -> start state -> sampler -> latent -> picture: the path of sampling, walked once.

Everything that draws goes through `sample`; ways to draw differ in their start state only.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import catalogue
from ldm.conditioning.condition import Condition, cat
from ldm.conditioning.planes import depth_plane, inpainting_planes
from ldm.diffusion import Branches, Denoiser, Fraction, LearnedVariance, bind
from ldm.errors import UserError
from ldm.guidance import (
    autoguidance,
    cfg,
    classifier_guidance,
    dynamic_threshold,
    keep,
    perpendicular_negative,
    static_threshold,
)
from ldm.guides import Guides, load_guides
from ldm.inputs import check_depths, check_images, check_masks
from ldm.jobs import Ask, Request, Settings, batches, real
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, Step, finish, listed, make_grid, start, tail
from ldm.sampling.step import solver_state

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


THRESHOLDS = {"static": static_threshold, "dynamic": dynamic_threshold}
LATENT_BOUND = 4.0  # deviations; the latents of 640 real pictures of the shipped model's reach 3.9 at most


@dataclass(frozen=True, eq=False)
class Begin:
    """A picture to begin from, instead of nothing but noise.

    `image`: (B, 3, H, W) in [-1, 1], one for each request, H and W divisible by f.
    `strength`: in (0, 1], the share of the grid's steps that are walked, from the picture noised to where they begin.
    `mask`: (B, 1, H, W) in [0, 1], 1 where the picture is drawn anew and 0 where it stays; None draws all of it.
    `depth`: (B, 1, H', W') of any scale, larger is nearer, for networks that take it.

    Raises UserError for anything else; `inputs` makes these of all that may be given.
    """

    image: Tensor
    strength: float = 0.75
    mask: Tensor | None = None
    depth: Tensor | None = None

    def __post_init__(self) -> None:
        real(self.strength, "the strength")
        check_images(self.image)
        if self.mask is not None:
            check_masks(self.mask, self.image)
        if self.depth is not None:
            check_depths(self.depth, len(self.image))

    def check(self, requests: int, settings: Settings) -> None:
        """Raise UserError unless there is one for each request, of the size that `settings` ask for, if they do."""
        if len(self.image) != requests:
            raise UserError(f"{len(self.image)} pictures to begin from were given for {requests} requests; match them")
        height, width = self.image.shape[2:]
        for name, asked, side in (("width", settings.width, width), ("height", settings.height, height)):
            if asked not in (None, side):
                raise UserError(
                    f"settings.{name} is {asked}, and the picture to begin from is {width} x {height} pixels, which is "
                    "the size of what is drawn; leave it out, or resize the picture"
                )

    def rows(self, rows: slice) -> Begin:
        """Those of some of the pictures."""
        mask, depth = (None if part is None else part[rows] for part in (self.mask, self.depth))
        return Begin(self.image[rows], self.strength, mask, depth)


class PromptNotice(UserWarning):
    """A prompt has words that the text tower does not read or does not know; the message names them."""


def draw(
    model: LatentDiffusion,
    requests: Sequence[Request],
    settings: Settings,
    batch_size: int = 4,
    begin: Begin | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1] on the CPU, one for each request, from noise or from `begin`.

    Outside a mask the pixels are those of the given picture, untouched by the autoencoder.
    Raises UserError for settings that the model cannot follow, and for a picture that is not finite in float32 either.
    """
    settings = settings.check()
    if begin is not None:
        begin.check(len(requests), settings)
    parts = batches(requests, batch_size)
    guides = load_guides(model, settings)
    drawn: list[Tensor] = []
    for batch in parts:
        first = sum(map(len, drawn))
        own = None if begin is None else begin.rows(slice(first, first + len(batch)))
        last = deque(sample(model, batch, settings, guides, own), maxlen=1).pop()
        image = decode(model, last, settings.tile).cpu()
        if own is not None and own.mask is not None:
            image = own.mask.cpu() * image + (1 - own.mask.cpu()) * own.image.cpu()
        drawn.append(image)
    return torch.cat(drawn)


def sample(
    model: LatentDiffusion,
    requests: Sequence[Request],
    settings: Settings,
    guides: Guides | None = None,
    begin: Begin | None = None,
) -> Iterator[Step]:
    """The trajectory of one batch, step by step; `decode` makes pictures of a step.

    A request's noise comes from its seed alone, so its picture does not depend on the batch it is drawn in (bit for
    bit on one device and batch size, to rounding otherwise). The caller may stop whenever it likes.
    `guides`: what `load_guides` made of `settings`, for those who draw many batches; None loads them here.
    Raises UserError, before the first step, for settings that the model cannot follow; warns of words that the text
    tower does not read or does not know (PromptNotice).
    """
    settings = settings.check()
    if begin is not None:
        begin.check(len(requests), settings)
    shape = latent_shape(model, settings) if begin is None else model.codec.latent_shape(*begin.image.shape[2:])
    overlap = None if settings.tile is None else model.codec.overlap(settings.tile)  # refused before the first step
    sigmas = make_sigmas(model, settings)
    with _memory_told(len(requests)):
        noise = make_noise(settings, [request.seed for request in requests], shape, model.device)
    with torch.no_grad(), _memory_told(len(requests)):
        planes = planes_of(model, shape, len(requests), begin)
    guides = guides or load_guides(model, settings)
    denoiser, fraction = make_denoiser(model, requests, settings, guides, shape, planes)
    sampler = make_sampler(model, settings, fraction)
    if begin is None:
        with _memory_told(len(requests)):
            x = start(noise.initial(), model.law.schedule, sigmas)
    else:
        sigmas = tail(sigmas, begin.strength)
        with torch.no_grad(), _memory_told(len(requests)):
            image = begin.image.to(model.device)
            if settings.tile is None or overlap is None:
                latent = model.codec.encode(image)
            else:
                latent = model.codec.encode_tiled(image, settings.tile, overlap)
        x = solver_state(latent) + float(sigmas[0]) * noise.initial()
        if begin.mask is not None and planes is None:  # what a mask touches at all is drawn
            denoiser = keep(denoiser, latent, F.max_pool2d(begin.mask.to(latent), model.codec.factor))
    steps = sampler(denoiser, x, sigmas, noise)
    while True:
        with torch.no_grad(), _memory_told(len(requests)):  # not across the yield: the mode is the caller's own
            step = next(steps, None)
        if step is None:
            return
        yield step


def make_denoiser(
    model: LatentDiffusion,
    requests: Sequence[Request],
    settings: Settings,
    guides: Guides,
    shape: tuple[int, int, int],
    planes: Tensor | None,
) -> tuple[Denoiser, Fraction | None]:
    """The model on what `requests` ask for, guided: by comparison first, then by the classifier, then thresholded.

    And, of a model that learned its variance, what it says of that for the prompts themselves. Latents have `shape`;
    `planes` are what stands beside them. Raises UserError for negative prompts beside a guide model, which stands in
    their place.
    """
    f = model.codec.factor
    asks, others = zip(*(request.asks(shape[1] * f, shape[2] * f) for request in requests), strict=True)
    how = settings.cfg, settings.cfg_rescale, settings.cfg_interval
    if guides.worse is not None:
        if any(ask.text for ask in others):
            raise UserError("a guide model stands in the negative prompt's place; leave one of the two out")
        branches = branches_of(model, [asks], planes)
        denoiser = autoguidance(branches, branches_of(guides.worse, [asks], planes), *how)
    elif settings.perp_negative is not None:
        branches = branches_of(model, [asks, [replace(ask, text="") for ask in others], others], planes)
        denoiser = perpendicular_negative(branches, settings.perp_negative, *how)
    else:
        # Under guidance scale 1 nothing looks at the unconditional branch, so it is not even encoded.
        branches = branches_of(model, [asks] if settings.cfg == 1 else [asks, others], planes)
        denoiser = cfg(branches, *how)

    if guides.classifier is not None:
        known = guides.classifier.config
        labels = guides.classifier.places([settings.classifier_class or ""] * len(requests))
        trained = known.sigma_min, known.sigma_max
        denoiser = classifier_guidance(denoiser, guides.classifier.of(labels), settings.classifier_scale, trained)
    if settings.threshold is not None:
        usual = 1.0 if model.codec.autoencoder is None else LATENT_BOUND
        denoiser = THRESHOLDS[settings.threshold](denoiser, settings.threshold_bound or usual)
    return denoiser, branches.fraction if isinstance(branches, LearnedVariance) else None


def branches_of(model: LatentDiffusion, asks: Sequence[Sequence[Ask]], planes: Tensor | None = None) -> Branches:
    """The model's predictions for K lists of B asks, each with the same `planes` (B, C, h, w) beside the latent."""
    with torch.no_grad():
        told = [replace(conditions(model, some), planes=planes) for some in asks]
    return (LearnedVariance if model.law.learned_variance else bind)(model.unet, told, model.law)


def planes_of(model: LatentDiffusion, shape: tuple[int, int, int], count: int, begin: Begin | None) -> Tensor | None:
    """What the network takes beside `count` latents of `shape`; None for most networks.

    An inpainting network's planes are of the picture and mask of `begin`; without a mask all of the picture is drawn,
    without a picture it is grey. Raises UserError for a network that takes what is not given.
    """
    c, h, w = shape
    extra = model.extra_channels
    if begin is not None and begin.depth is not None and extra != 1:
        raise UserError(f"the U-Net of {model.name or 'this model'} takes no depth map; leave it out")
    if not extra:
        return None
    if extra == 1 + c:
        size = (count, 3, h * model.codec.factor, w * model.codec.factor)
        image = torch.zeros(size, device=model.device) if begin is None else begin.image.to(model.device)
        mask = None if begin is None else begin.mask
        return inpainting_planes(model.codec, image, torch.ones_like(image[:, :1]) if mask is None else mask.to(image))
    if extra == 1 and begin is not None and begin.depth is not None:
        return depth_plane(begin.depth.to(model.device), (h, w))
    what = "a depth map, which img2img takes as depth=" if extra == 1 else "and nobody knows what they are"
    raise UserError(
        f"the U-Net of {model.name or 'this model'} takes {extra} channels beside the latent, {what}; give it, or draw "
        f"with a model that takes {c} channels"
    )


def decode(model: LatentDiffusion, step: Step, tile: int | None = None) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`; in tiles of `tile` pixels, or at once.

    Where the autoencoder overflows in half precision it runs once more in float32; raises UserError if that is not
    finite either, so that a broken picture is never passed on.
    """
    if not isinstance(step, Step):
        raise UserError(f"decode takes a step that sample yields, and got a {type(step).__name__}")
    with torch.no_grad(), _memory_told(len(step.x)):
        latent = finish(step.x, model.law.schedule, torch.tensor([step.sigma_next]))
        if tile is None:
            return model.codec.decode(latent)
        return model.codec.decode_tiled(latent, tile, model.codec.overlap(tile))


def conditions(model: LatentDiffusion, asks: Sequence[Ask]) -> Condition:
    """What the model is told (B rows).

    Each ask is read by itself (and once): in a batch its last bits would depend on how many others there are.
    """
    read: dict[Ask, Condition] = {}
    for ask in dict.fromkeys(asks):
        read[ask], notices = model.encoder([ask])
        for notice in notices:
            warnings.warn(notice, PromptNotice, stacklevel=2)
    return cat([read[ask] for ask in asks]).to(model.device)


def prompt_notices(model: LatentDiffusion, requests: Sequence[Request]) -> tuple[str, ...]:
    """What a user should know of how the prompts and negative prompts are read: `Encoder.notices`."""
    return model.encoder.notices([text for request in requests for text in (request.prompt, request.negative)])


def latent_shape(model: LatentDiffusion, settings: Settings) -> tuple[int, int, int]:
    """(C, h, w) of the pictures that `settings` ask for; raises UserError for a size that f does not divide."""
    side = model.config.image_size
    return model.codec.latent_shape(settings.height or side, settings.width or side)


def make_sampler(model: LatentDiffusion, settings: Settings, fraction: Fraction | None = None) -> Sampler:
    """The sampler of checked `settings` with its options bound, and the model's law where it is defined by one.

    `fraction`: the variance that the model learned. Raises UserError for an option that makes no sense.
    """
    factory = SAMPLERS[settings.sampler]
    of_model = {"schedule": model.law.schedule, "fraction": fraction}
    taken = {name: of_model[name] for name in inspect.signature(factory).parameters if name in of_model}
    return factory(**settings.options, **taken)


def make_sigmas(model: LatentDiffusion, settings: Settings) -> Tensor:
    """(N + 1,) the grid of checked `settings`; raises UserError for one that the model's law does not have."""
    if settings.sigmas:
        return listed(model.law.schedule, settings.sigmas)
    return make_grid(model.law.schedule, settings.steps, settings.spacing or "trailing")


def make_noise(
    settings: Settings, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device
) -> NoiseStream | BrownianPath:
    """The kind of noise that the sampler wants, for one picture of `shape` (C, h, w) from each seed."""
    kind = BrownianPath if catalogue.SAMPLERS[settings.sampler].noise == "path" else NoiseStream
    return kind(seeds, shape, device)


@contextmanager
def _memory_told(pictures: int) -> Iterator[None]:
    """Turns the out-of-memory errors of GPU and CPU into a sentence."""
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no error of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            f"the device's memory does not suffice for {pictures} pictures of this size at once; "
            "use a smaller --batch-size or size, --tile for the decoding, or --precision fp16"
        ) from error
