"""Prompt -> context -> start state -> sampler -> latent -> picture: the path of sampling, walked once.

Everything that draws goes through `sample`; ways to draw differ in their start state only.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import catalogue
from ldm.diffusion import Branches, Denoiser, Fraction, LearnedVariance, bind
from ldm.errors import UserError, printable
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
from ldm.inputs import check_images, check_masks
from ldm.jobs import Request, Settings, batches, real
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, Step, finish, listed, make_grid, start, tail
from ldm.sampling.step import solver_state

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion
    from ldm.unet.attention import ContextKV


THRESHOLDS = {"static": static_threshold, "dynamic": dynamic_threshold}
SHOWN_WORDS = 12  # of those unknown to a model, in a notice
LATENT_BOUND = 4.0  # deviations; the latents of 640 real pictures of the shipped model's reach 3.9 at most


@dataclass(frozen=True, eq=False)
class Begin:
    """A picture to begin from, instead of nothing but noise.

    `image`: (B, 3, H, W) in [-1, 1], one for each request, H and W divisible by f.
    `strength`: in (0, 1], the share of the grid's steps that are walked, from the picture noised to where they begin.
    `mask`: (B, 1, H, W) in [0, 1], 1 where the picture is drawn anew and 0 where it stays; None draws all of it.

    Raises UserError for anything else; `inputs` makes these of all that may be given.
    """

    image: Tensor
    strength: float = 0.75
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        real(self.strength, "the strength")
        check_images(self.image)
        if self.mask is not None:
            check_masks(self.mask, self.image)

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
        return Begin(self.image[rows], self.strength, None if self.mask is None else self.mask[rows])


class PromptCut(UserWarning):
    """A prompt is longer than the text tower reads; the message names the words that were dropped."""


class UnknownWords(UserWarning):
    """A prompt has words that the text tower takes for one another; the message names them."""


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
    tower does not read (PromptCut) or does not know (UnknownWords).
    """
    settings = settings.check()
    if begin is not None:
        begin.check(len(requests), settings)
    shape = latent_shape(model, settings) if begin is None else model.codec.latent_shape(*begin.image.shape[2:])
    overlap = None if settings.tile is None else model.codec.overlap(settings.tile)  # refused before the first step
    sigmas = make_sigmas(model, settings)
    with _memory_told(len(requests)):
        noise = make_noise(settings, [request.seed for request in requests], shape, model.device)
    denoiser, fraction = make_denoiser(model, requests, settings, guides or load_guides(model, settings))
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
        if begin.mask is not None:  # what a mask touches at all is drawn
            denoiser = keep(denoiser, latent, F.max_pool2d(begin.mask.to(latent), model.codec.factor))
    steps = sampler(denoiser, x, sigmas, noise)
    while True:
        with torch.no_grad(), _memory_told(len(requests)):  # not across the yield: the mode is the caller's own
            step = next(steps, None)
        if step is None:
            return
        yield step


def make_denoiser(
    model: LatentDiffusion, requests: Sequence[Request], settings: Settings, guides: Guides
) -> tuple[Denoiser, Fraction | None]:
    """The model on the prompts of `requests`, guided: by comparison first, then by the classifier, then thresholded.

    And, of a model that learned its variance, what it says of that for the prompts themselves.
    Raises UserError for negative prompts beside a guide model, which stands in their place.
    """
    prompts = [request.prompt for request in requests]
    negatives = [request.negative for request in requests]
    how = settings.cfg, settings.cfg_rescale, settings.cfg_interval
    if guides.worse is not None:
        if any(negatives):
            raise UserError("a guide model stands in the negative prompt's place; leave one of the two out")
        branches = branches_of(model, [prompts])
        denoiser = autoguidance(branches, branches_of(guides.worse, [prompts]), *how)
    elif settings.perp_negative is not None:
        branches = branches_of(model, [prompts, [""] * len(prompts), negatives])
        denoiser = perpendicular_negative(branches, settings.perp_negative, *how)
    else:
        # Under guidance scale 1 nothing looks at the unconditional branch, so it is not even encoded.
        branches = branches_of(model, [prompts] if settings.cfg == 1 else [prompts, negatives])
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


def branches_of(model: LatentDiffusion, prompts: Sequence[Sequence[str]]) -> Branches:
    """The model's predictions for K lists of B prompts; their keys and values are projected when first needed.

    Raises UserError for a model that has to be given more than prompts.
    """
    model.check_prompt_suffices()
    with torch.no_grad():
        contexts = [encode(model, texts) for texts in prompts]

    def prepare(some: Sequence[Tensor]) -> ContextKV:
        return model.unet.project_context(torch.cat(list(some)))

    bound = LearnedVariance if model.law.learned_variance else bind
    return bound(model.unet, contexts, prepare, model.law)


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


def encode(model: LatentDiffusion, prompts: Sequence[str]) -> Tensor:
    """Context (B, L, D) of the prompts.

    Each is read by itself (and once): in a batch its last bits would depend on how many others there are.
    """
    contexts: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(prompts):
        tokens, (words,) = model.text.tokenize([prompt])
        if words:
            warnings.warn(_cut_notice(prompt, words), PromptCut, stacklevel=2)
        unknown = model.text.unknown_words(tokens[0])
        if unknown:
            warnings.warn(_unknown_notice(model, unknown), UnknownWords, stacklevel=2)
        contexts[prompt] = model.text(tokens.to(model.device))
    return torch.cat([contexts[prompt] for prompt in prompts])


def prompt_notices(model: LatentDiffusion, requests: Sequence[Request]) -> list[str]:
    """One sentence for each different prompt or negative prompt that the text tower does not read to its end, and one
    for all words that it does not know."""
    texts = list(dict.fromkeys(text for request in requests for text in (request.prompt, request.negative)))
    tokens, dropped = model.text.tokenize(texts)
    found = [_cut_notice(text, words) for text, words in zip(texts, dropped, strict=True) if words]
    unknown = dict.fromkeys(word for row in tokens for word in model.text.unknown_words(row))
    return [*found, _unknown_notice(model, list(unknown))] if unknown else found


def _cut_notice(prompt: str, words: str) -> str:
    shown = prompt if len(prompt) <= 40 else f"{prompt[:39]}…"
    return printable(f"the prompt '{shown}' is longer than the text tower reads; dropped: {words}")


def _unknown_notice(model: LatentDiffusion, words: Sequence[str]) -> str:
    shown = ", ".join(f"'{word[:40]}'" for word in words[:SHOWN_WORDS])
    more = f" and {len(words) - SHOWN_WORDS} more" if len(words) > SHOWN_WORDS else ""
    return printable(
        f"the text tower of {model.name or 'this model'} does not know {shown}{more}: it takes all such words for one, "
        "so what they mean is not drawn; use words that it was trained on"
    )


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
