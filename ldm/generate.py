"""Plan -> condition -> denoiser, start state -> sampler -> latent -> picture: the path of sampling, walked once.

Everything that draws goes through `sample`, which opens no file: what stands beside the model is opened before
(helpers.py). Ways to draw differ in their start (start.py).
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.backends import sparing
from ldm.backends.sparing import visiting
from ldm.diffusion import Denoiser, LearnedVariance
from ldm.errors import UserError, out_of_memory
from ldm.guidance import (
    autoguidance,
    cfg,
    classifier_guidance,
    dynamic_threshold,
    perpendicular_negative,
    refined,
    static_threshold,
    together,
)
from ldm.guidance.seen import Seen
from ldm.helpers import NONE, Helpers
from ldm.jobs import Plan, Request, batches, catalogue, grammar
from ldm.jobs.plan import Auto, Cfg, Classifier, Guide, PerpNegative, Refine, Threshold, told_scale
from ldm.jobs.request import Sizes
from ldm.jobs.values import reals
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, Step, finish, listed, make_grid
from ldm.sampling.noise import Draws
from ldm.sampling.slerp import varied
from ldm.sampling.step import Noise as NoiseOf
from ldm.start import Noise, Pictures, Start
from ldm.told import branches_of, conditions, prompt_notices  # noqa: F401 (those who draw ask for them here)
from ldm.unet.shortcuts import shortened

if TYPE_CHECKING:
    from ldm.model import Model

THRESHOLDS = {"static": static_threshold, "dynamic": dynamic_threshold}
LATENT_BOUND = 4.0  # deviations; the latents of 640 real pictures of the shipped model's reach 3.9 at most


def draw(
    model: Model,
    requests: Sequence[Request],
    plan: Plan,
    helpers: Helpers = NONE,
    batch_size: int = 4,
    picture: Pictures | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1] on the CPU, one for each request, from noise or from `picture`.

    Outside a mask the pixels are those of the given picture, untouched by the autoencoder.
    Raises UserError for a plan that the model cannot follow, and for a picture that is not finite in float32 either.
    """
    if picture is not None:
        picture.shape(model, plan, len(requests))
    drawn: list[Tensor] = []
    for batch in batches(requests, batch_size):
        first = sum(map(len, drawn))
        own = None if picture is None else picture.rows(slice(first, first + len(batch)))
        last = deque(sample(model, batch, plan, helpers, own or Noise()), maxlen=1).pop()
        image = decode(model, last, plan.tile).cpu()
        drawn.append(image if own is None else own.paste(image))
    return torch.cat(drawn)


def sample(
    model: Model, requests: Sequence[Request], plan: Plan, helpers: Helpers = NONE, start: Start = Noise()
) -> Iterator[Step]:
    """The trajectory of one batch, step by step; `decode` makes pictures of a step.

    A request's noise comes from its seed alone, so its picture does not depend on the batch it is drawn in (bit for
    bit on one device and batch size, to rounding otherwise). The caller may stop whenever it likes.
    `helpers`: what `open_helpers` opened for the plan. Raises UserError, before the first step, for a plan that the
    model cannot follow.
    """
    helpers.check(plan)
    count = len(requests)
    shape = start.shape(model, plan, count)
    if plan.tile is not None:
        model.codec.overlap(plan.tile)  # refused before the first step
    sigmas = make_sigmas(model, plan)
    with torch.no_grad(), _memory_told(count):
        noise = make_noise(plan, requests, shape, model.device)
        with visiting(model, model.codec.autoencoder):
            planes = start.planes(model, shape, count)
        denoiser, beside = make_denoiser(model, requests, plan, helpers, shape, planes)
        with visiting(model, model.codec.autoencoder):
            x, sigmas, denoiser, *own = start.place(model, plan, sigmas, noise, denoiser, planes)
        sampler = own[0] if own else make_sampler(model, plan, beside)
        for begins in model.kept.get("onlookers", ()):
            begins(count)
        # From a single level there is nowhere to go: the state is what comes out.
        steps = sampler(denoiser, x, sigmas, noise) if len(sigmas) > 1 else iter([Step(0, 1, 0.0, 0.0, x, x)])
    with visiting(model, model.unet, *(other.unet for other in helpers.readers)):
        while True:
            with torch.no_grad(), _memory_told(count):  # not across the yield: the mode is the caller's own
                step = next(steps, None)
            if step is None:
                return
            yield step


def make_denoiser(
    model: Model,
    requests: Sequence[Request],
    plan: Plan,
    helpers: Helpers,
    shape: tuple[int, int, int],
    planes: Tensor | None,
) -> tuple[Denoiser, dict[str, Any]]:
    """The model on what `requests` ask for, guided: what is compared first, then each wrap in order.

    And what else of it a sampler may ask for, by the name of its parameter: `unguided`, the prediction that is led away
    from, and `fraction`, what a model that learned its variance says of that for the prompts themselves. Latents have
    `shape`; `planes` are what stands beside them. Raises UserError for prompts that the plan's guide does not take.
    """
    check_told(model, plan, helpers)
    denoiser, beside = _guided(model, requests, plan, helpers, shape, planes)
    for wrap in plan.wraps:
        if isinstance(wrap, Refine):
            other = helpers.refiners[wrap.model]
            own = replace(plan, network=None)  # what stands in the base's place is no refiner
            refiner, its = _guided(other, requests, own, helpers, shape, planes if other.extra_channels else None)
            denoiser = refined(denoiser, refiner, _below(other, wrap))
            for name in its.keys() & beside.keys():  # without a fraction of its own the base is asked for that
                beside[name] = refined(beside[name], its[name], _below(other, wrap))
        else:
            denoiser = _wrapped(denoiser, wrap, model, helpers, len(requests))
    return denoiser, beside


def check_told(model: Model, plan: Plan, helpers: Helpers) -> None:
    """Raise UserError if the plan says sizes or scores, and none of the networks that draw is told any."""
    told = [each.encoder.config for each in (model, *helpers.refiners.values())]
    sizes, usual = plan.sizes, Sizes()
    if not any(config.sizes for config in told) and replace(sizes, scores=usual.scores) != usual:
        raise UserError(f"{model.name or 'this model'} is told no sizes; leave out original_size, crop and target_size")
    if not any(config.score for config in told) and sizes.scores != usual.scores:
        raise UserError(f"{model.name or 'this model'} is told no score; leave out score and negative_score")
    if sizes.target is not None and all(config.score or not config.sizes for config in told):
        raise UserError(f"{model.name or 'this model'} is told a score in the place of target_size; leave that out")


def _below(refiner: Model, wrap: Refine) -> float:
    """The sigma below which it draws: the share is of the levels that it was trained under, those of whole t below."""
    if wrap.sigma is not None:
        return wrap.sigma
    schedule = refiner.law.schedule
    return float(schedule.sigma(torch.tensor(max(wrap.share * schedule.steps - 0.5, 0.0), dtype=torch.float64)))


def _guided(
    model: Model,
    requests: Sequence[Request],
    plan: Plan,
    helpers: Helpers,
    shape: tuple[int, int, int],
    planes: Tensor | None,
) -> tuple[Denoiser, dict[str, Any]]:
    """One model with the plan's guide; see `make_denoiser`."""
    f = model.codec.factor
    pairs = [request.asks(shape[1] * f, shape[2] * f, plan.weighted, plan.sizes) for request in requests]
    asks, others = zip(*pairs, strict=True)
    clauses, weights = grammar.conjunction(asks)
    guide, scale = plan.guide, 1.0
    if model.config.told_guidance and not callable(guide):  # it guides itself
        guide, scale = Cfg(1.0), told_scale(guide, len(clauses) > 1, model.name or "this model")
    told = (Cfg() if callable(guide) else guide).asks(clauses, others)
    network = plan.network
    if plan.shortcuts:
        if network is not None:
            raise UserError("the plan has a network of its own, which no shortcut is known of; leave one of them out")
        network = shortened(model.unet, plan.shortcuts)
    own = branches_of(model, told, planes, network, scale)
    branches = together(own, weights, len(told) + 1 - len(clauses)) if len(clauses) > 1 else own
    seen = Seen(branches)
    if callable(guide):
        denoiser: Denoiser = guide(branches)
        if not callable(denoiser):
            raise UserError(f"the guide gave {denoiser!r:.60}; it gives a function (x, sigma) -> x0")
    elif isinstance(guide, Auto):
        worse = branches_of(helpers.models[guide.model], [asks], planes)
        denoiser = autoguidance(branches, worse, *_how(guide))
    elif isinstance(guide, PerpNegative):
        denoiser = perpendicular_negative(seen, guide.weight, *_how(guide))
    else:
        denoiser = cfg(seen, *_how(guide))
    fraction = {"fraction": own.fraction} if isinstance(own, LearnedVariance) else {}
    return denoiser, {"unguided": seen.unguided, **fraction}


def _how(guide: Guide) -> tuple[float, float, tuple[float, float] | None]:
    return guide.scale, guide.rescale, guide.interval


def _wrapped(denoiser: Denoiser, wrap: Classifier | Threshold, model: Model, helpers: Helpers, count: int) -> Denoiser:
    if isinstance(wrap, Classifier):
        classifier = helpers.classifiers[wrap.folder]
        trained = classifier.config.sigma_min, classifier.config.sigma_max
        labels = classifier.places([wrap.label] * count)
        return classifier_guidance(denoiser, classifier.of(labels), wrap.scale, trained)
    usual = 1.0 if model.codec.autoencoder is None else LATENT_BOUND
    return THRESHOLDS[wrap.kind](denoiser, wrap.bound or usual)


def decode(model: Model, step: Step, tile: int | None = None) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1], of the state after `step`; in tiles of `tile` pixels, or at once.

    Where the autoencoder overflows in half precision it runs once more in float32; raises UserError if that is not
    finite either, so that a broken picture is never passed on.
    """
    if not isinstance(step, Step):
        raise UserError(f"decode takes a step that sample yields, and got a {type(step).__name__}")
    with torch.no_grad(), _memory_told(len(step.x)):
        latent = finish(step.x, model.law.schedule, torch.tensor([step.sigma_next]))
        with visiting(model, model.codec.autoencoder):
            rows, f = None if model.works_on is None else 1, model.codec.factor
            least = max(model.config.image_size // 2 // f, 1) * f
            return sparing.decode(model.codec, latent, tile, rows, least)


def make_sampler(model: Model, plan: Plan, beside: Mapping[str, Any] | None = None) -> Sampler:
    """The plan's sampler with its options bound, the model's law where it is defined by one, and what it asks for of
    what `make_denoiser` gives `beside` the denoiser. Raises UserError for an option that makes no sense.
    """
    if callable(plan.sampler):
        return _checked(plan.sampler)
    factory = SAMPLERS[plan.sampler]
    if beside is None and "unguided" in inspect.signature(factory).parameters:
        raise UserError(
            f"{plan.sampler} looks at the unguided prediction, and there is none here; choose euler or another"
        )
    of_model = {"schedule": model.law.schedule, **(beside or {})}
    taken = {name: of_model[name] for name in inspect.signature(factory).parameters if name in of_model}
    return factory(**plan.options, **taken)


def _checked(sampler: Sampler) -> Sampler:
    """A caller's own; raises UserError where it yields anything but steps, or none."""

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: NoiseOf) -> Iterator[Step]:
        steps, step = sampler(denoiser, x, sigmas, noise), None
        if not isinstance(steps, Iterable):
            raise UserError(f"the sampler gave {steps!r:.60}; it is a generator of steps, see sampling.Sampler")
        for step in steps:
            if not isinstance(step, Step):
                raise UserError(f"the sampler yielded {step!r:.60}; it yields a sampling.Step for each interval")
            yield step
        if step is None:
            raise UserError("the sampler yielded no step; it yields one for each interval of the grid")

    return sample


def make_sigmas(model: Model, plan: Plan) -> Tensor:
    """(N + 1,) the plan's grid; raises UserError for one that the model's law does not have."""
    if plan.sigmas:
        return listed(model.law.schedule, plan.sigmas)
    if callable(plan.spacing):
        return listed(model.law.schedule, reals(plan.spacing(model.law.schedule, plan.steps), "the grid"))
    spacing = plan.spacing or catalogue.own_grid(plan.sampler, model.law.schedule.is_flow)
    return make_grid(model.law.schedule, plan.steps, spacing, plan.rho)


def make_noise(plan: Plan, requests: Sequence[Request], shape: tuple[int, int, int], device: torch.device) -> Draws:
    """The plan's kind of noise, or the one that its sampler wants, for pictures of `shape` (C, h, w).

    A sampler that is given as a value gets a Brownian path, as most of those with a name do.
    """
    kind = BrownianPath
    if isinstance(plan.sampler, str) and catalogue.SAMPLERS[plan.sampler].noise != "path":
        kind = NoiseStream
    return varied((plan.noise or kind)([request.seed for request in requests], shape, device), requests)


@contextmanager
def _memory_told(pictures: int) -> Iterator[None]:
    """Turns the out-of-memory errors of GPU and CPU into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"the device's memory does not suffice for {pictures} pictures of this size at once; "
            "use a smaller --batch-size or size, --low-memory, --tile for the decoding, or --precision fp16"
        ) from error
