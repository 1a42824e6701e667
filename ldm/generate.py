"""Prompt -> context -> start state -> sampler -> latent -> picture: the path of sampling, walked once.

Everything that draws goes through `sample`; ways to draw differ in their start state only.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm import catalogue
from ldm.diffusion import bind
from ldm.errors import UserError
from ldm.guidance import cfg
from ldm.jobs import Request, Settings, batches
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, Step, finish, listed, make_grid, start

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion
    from ldm.unet.attention import ContextKV


class PromptCut(UserWarning):
    """A prompt is longer than the text tower reads; the message names the words that were dropped."""


def txt2img(model: LatentDiffusion, requests: Sequence[Request], settings: Settings, batch_size: int = 4) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1] on the CPU, one for each request.

    Raises UserError for settings that the model cannot follow, and for a picture that is not finite in float32 either.
    """
    drawn = []
    for batch in batches(requests, batch_size):
        last = deque(sample(model, batch, settings), maxlen=1).pop()
        drawn.append(decode(model, last).cpu())
    return torch.cat(drawn)


def sample(model: LatentDiffusion, requests: Sequence[Request], settings: Settings) -> Iterator[Step]:
    """The trajectory of one batch, step by step; `decode` makes pictures of a step.

    A request's noise comes from its seed alone, so its picture does not depend on the batch it is drawn in (bit for
    bit on one device and batch size, to rounding otherwise). The caller may stop whenever it likes.
    Raises UserError, before the first step, for settings that the model cannot follow; warns of words that the text
    tower does not read (PromptCut).
    """
    settings = settings.check()
    shape = latent_shape(model, settings)
    sampler, sigmas = make_sampler(model, settings), make_sigmas(model, settings)
    noise = make_noise(settings, [request.seed for request in requests], shape, model.device)
    x = start(noise.initial(), model.schedule, sigmas)
    with torch.no_grad():
        # Under guidance scale 1 nothing looks at the unconditional branch, so it is not even encoded.
        prompts = [[request.prompt for request in requests]]
        if settings.cfg != 1:
            prompts.append([request.negative for request in requests])
        contexts = [encode(model, texts) for texts in prompts]

    def prepare(some: Sequence[Tensor]) -> ContextKV:
        return model.unet.project_context(torch.cat(list(some)))

    branches = bind(model.unet, contexts, prepare, model.schedule, model.parameterization)
    denoiser = cfg(branches, settings.cfg, settings.cfg_rescale, settings.cfg_interval)
    steps = sampler(denoiser, x, sigmas, noise)
    while True:
        with torch.no_grad(), _memory_told(len(requests)):  # not across the yield: the mode is the caller's own
            step = next(steps, None)
        if step is None:
            return
        yield step


def decode(model: LatentDiffusion, step: Step) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`.

    Where the autoencoder overflows in half precision it runs once more in float32; raises UserError if that is not
    finite either, so that a broken picture is never passed on.
    """
    with torch.no_grad(), _memory_told(len(step.x)):
        return model.codec.decode(finish(step.x, model.schedule, torch.tensor([step.sigma_next])))


def encode(model: LatentDiffusion, prompts: Sequence[str]) -> Tensor:
    """Context (B, L, D) of the prompts.

    Each is read by itself (and once): in a batch its last bits would depend on how many others there are.
    """
    contexts: dict[str, Tensor] = {}
    for prompt in dict.fromkeys(prompts):
        tokens, (words,) = model.text.tokenize([prompt])
        if words:
            warnings.warn(_cut_notice(prompt, words), PromptCut, stacklevel=2)
        contexts[prompt] = model.text(tokens.to(model.device))
    return torch.cat([contexts[prompt] for prompt in prompts])


def cut_notices(model: LatentDiffusion, requests: Sequence[Request]) -> list[str]:
    """One sentence for each different prompt or negative prompt that the text tower does not read to its end."""
    texts = list(dict.fromkeys(text for request in requests for text in (request.prompt, request.negative)))
    _, dropped = model.text.tokenize(texts)
    return [_cut_notice(text, words) for text, words in zip(texts, dropped, strict=True) if words]


def _cut_notice(prompt: str, words: str) -> str:
    shown = prompt if len(prompt) <= 40 else f"{prompt[:39]}…"
    return f"the prompt '{shown}' is longer than the text tower reads; dropped: {words}"


def latent_shape(model: LatentDiffusion, settings: Settings) -> tuple[int, int, int]:
    """(C, h, w) of the pictures that `settings` ask for; raises UserError for a size that f does not divide."""
    side = model.config.image_size
    return model.codec.latent_shape(settings.height or side, settings.width or side)


def make_sampler(model: LatentDiffusion, settings: Settings) -> Sampler:
    """The sampler of checked `settings` with its options bound, and the model's law where it is defined by one.

    Raises UserError for an option that makes no sense.
    """
    factory = SAMPLERS[settings.sampler]
    law = {"schedule": model.schedule} if "schedule" in inspect.signature(factory).parameters else {}
    return factory(**settings.options, **law)


def make_sigmas(model: LatentDiffusion, settings: Settings) -> Tensor:
    """(N + 1,) the grid of checked `settings`; raises UserError for one that the model's law does not have."""
    if settings.sigmas:
        return listed(model.schedule, settings.sigmas)
    return make_grid(model.schedule, settings.steps, settings.spacing or "trailing")


def make_noise(
    settings: Settings, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device
) -> NoiseStream | BrownianPath:
    """The kind of noise that the sampler wants, for one picture of `shape` (C, h, w) from each seed."""
    kind = BrownianPath if catalogue.SAMPLERS[settings.sampler].noise == "path" else NoiseStream
    return kind(seeds, shape, device)


@contextmanager
def _memory_told(pictures: int) -> Iterator[None]:
    """Turns the GPU's out-of-memory error into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not suffice for {pictures} pictures of this size at once; "
            "use a smaller --batch-size or size, or --precision fp16"
        ) from error
