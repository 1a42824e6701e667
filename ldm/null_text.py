"""Null-text inversion (Mokady et al. 2023): a picture that comes back at any guidance, and can be edited there.

At guidance 1 a picture's way up and down nearly agree. At a larger one the way down leaves it; what is optimised is
the context of the empty prompt, level by level, so that the guided step meets the way up again. The result is a model,
whose answer to the empty prompt is told of the level, and the start from which it draws the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import generate, start
from ldm.backends.sparing import visiting
from ldm.conditioning.condition import Condition
from ldm.config import UNetConfig
from ldm.diffusion import Law, Network, precondition
from ldm.errors import UserError
from ldm.helpers import NONE
from ldm.inputs import Picture, as_images
from ldm.inverted import Inverted
from ldm.inverting import of_picture
from ldm.jobs import Settings, of_prompts
from ldm.jobs.plan import Cfg
from ldm.jobs.values import whole
from ldm.sampling import ddim
from ldm.sampling.inversion import rise
from ldm.sampling.step import flow, level

if TYPE_CHECKING:
    from ldm.api import LatentDiffusion

MOST_ITERATIONS = 1000
RATE = 0.01
ENOUGH, MORE = 1e-5, 2e-5
"""The squared error at which a level is done, and what more of it each later one may have; in z, of unit variance."""


class NullText(nn.Module):
    """`network`, which is told another context at each level where it would be told the empty prompt's.

    `null`: (1, L, D), the empty prompt's. `contexts`: (N, 1, L, D), by falling `times`; the nearest one is taken.
    """

    def __init__(self, network: Any, null: Tensor, contexts: Tensor, times: Sequence[float]) -> None:
        super().__init__()
        self.network, self.null, self.contexts = network, null, contexts
        self.times = torch.tensor(times)

    @property
    def config(self) -> UNetConfig:
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def prepare(self, told: Condition) -> Condition:
        return told

    def forward(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
        context = told.context
        if context is None:
            return self.network(x, t, told)
        nearest = self.contexts[int((self.times - t[0].cpu()).abs().argmin())]
        beyond = context.shape[1] - self.null.shape[1]  # beside a prompt of several chunks the empty one is padded
        own, null = (F.pad(part.to(context), (0, 0, 0, beyond)) for part in (nearest, self.null))
        empty = (context == null).flatten(1).all(1)
        return self.network(x, t, replace(told, context=torch.where(empty[:, None, None], own, context)))


def null_text(
    model: LatentDiffusion,
    image: Picture,
    prompt: str,
    *,
    cfg: float | None = None,
    steps: int | None = None,
    iterations: int = 10,
    settings: Settings = Settings(sampler="ddim", spacing="trailing", steps=30),
) -> tuple[LatentDiffusion, Inverted]:
    """A model whose empty prompt leads back to `image`, told `prompt`, at this cfg; and the start that it begins from.

    `model.txt2img(other, start=start)` of the two draws the picture with other words. By ddim, in N (2 + `iterations`)
    evaluations of the network and as many gradients as iterations, fewer where a level is done before.
    Raises UserError for a model without text, and for settings of another kind than ddim's without noise.
    """
    settings = settings.but(cfg, steps, None)
    plan, (request,) = settings.plan(), of_prompts(prompt)
    picture = start.Picture(as_images(image), 1.0)
    if (
        model.text is None
        or plan.sampler != "ddim"
        or plan.options.get("eta")
        or plan.wraps
        or plan.shortcuts
        or not isinstance(plan.guide, Cfg)
    ):
        raise UserError(
            "null-text inversion takes a model of captions, ddim with eta 0, and guidance by cfg alone, without "
            "merge_tokens and reuse"
        )
    if not 0 <= whole(iterations, "iterations") <= MOST_ITERATIONS:
        raise UserError(f"{iterations} iterations were asked for; choose 0 to {MOST_ITERATIONS}")
    requests = [request]
    picture.shape(model, plan, 1)
    if model.config.told_guidance:
        raise UserError(
            "null-text inversion trains the empty prompt, and this model, which is told its guidance scale, has no use "
            "for one"
        )
    if model.extra_channels:
        raise UserError("null-text inversion takes a network of the latent alone; this one takes other planes too")
    sigmas = generate.make_sigmas(model, plan)
    denoiser, x = of_picture(
        model, requests, replace(plan, guide=replace(plan.guide, scale=1.0)), NONE, picture, sigmas
    )
    f, (h, w) = model.codec.factor, x.shape[2:]
    asks, others = zip(*(request.asks(h * f, w * f, plan.weighted) for request in requests), strict=True)
    with torch.no_grad():
        told, empty = (generate.conditions(model, some) for some in (asks, others))
    with visiting(model, model.unet):
        with torch.no_grad():
            pivots = [x, *(step.x for step in rise(ddim(), denoiser, x, sigmas))][::-1]
        contexts = _optimised(model.unet, model.law, told, empty, pivots, sigmas, plan.guide.scale, iterations)
    assert empty.context is not None
    times = model.law.schedule.t(sigmas[:-1]).tolist()
    size = picture.image.shape[2], picture.image.shape[3]
    network = NullText(model.unet, empty.context, contexts, times)
    return replace(model, unet=network), Inverted(pivots[0], float(sigmas[0]), size, settings)


def _optimised(
    network: Network,
    law: Law,
    told: Condition,
    empty: Condition,
    pivots: Sequence[Tensor],
    sigmas: Tensor,
    scale: float,
    iterations: int,
) -> Tensor:
    """(N, 1, L, D): for each step the context in the empty prompt's place that brings it to the next pivot."""
    levels, x, found = sigmas.tolist(), pivots[0], []
    context = empty.context
    assert context is not None

    def predicted(x: Tensor, sigma: float, condition: Condition) -> Tensor:
        return precondition(lambda x, t: network(x, t, network.prepare(condition)), law)(x, level(sigma))

    def step(x: Tensor, ends: tuple[float, float], towards: Tensor, context: Tensor) -> Tensor:
        away = predicted(x, ends[0], replace(empty, context=context))
        return flow(x, away + scale * (towards - away), *ends)

    for index, ends in enumerate(pairwise(levels)):
        with torch.no_grad():
            towards = predicted(x, ends[0], told)
        context = context.detach().clone().requires_grad_()
        adam = torch.optim.Adam([context], lr=RATE * (1 - index / (2 * len(levels))))
        alpha = float(law.schedule.alpha(level(ends[1])))
        for _ in range(iterations):
            with torch.enable_grad():
                error = (alpha * (step(x, ends, towards, context) - pivots[index + 1])).square().mean()
                if error.item() < ENOUGH + index * MORE:
                    break
                (context.grad,) = torch.autograd.grad(error, context)
            adam.step()
        with torch.no_grad():
            x = step(x, ends, towards, context)
        found.append(context.detach())
    return torch.stack(found)
