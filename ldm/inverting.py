"""From a picture to the noise that a model draws it from, to draw from again with other words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm import generate
from ldm.backends.sparing import visiting
from ldm.diffusion import Denoiser
from ldm.errors import UserError
from ldm.helpers import Helpers
from ldm.inverted import Inverted
from ldm.jobs import Plan, Request, Settings, batches
from ldm.jobs.settings import USUAL
from ldm.jobs.values import whole
from ldm.sampling import weakened
from ldm.sampling.inversion import edict_up
from ldm.sampling.inversion import invert as walk_up
from ldm.sampling.step import solver_state
from ldm.start import Noise, Picture, latent_of

if TYPE_CHECKING:
    from ldm.model import Model

MOST_REFINEMENTS = 20


def invert(
    model: Model,
    requests: Sequence[Request],
    plan: Plan,
    settings: Settings,
    helpers: Helpers,
    picture: Picture,
    refinements: int = 1,
    exact: bool = False,
    batch_size: int = 4,
) -> Inverted:
    """What `plan` draws `picture` from, told of `requests`, one for each picture, about or `exact`. `settings`: which
    the plan was made of.

    Raises UserError for settings that draw noise on their way, and as `generate.sample`.
    """
    settings = settings.of(USUAL)  # a model of few steps is inverted in more
    if not 0 <= whole(refinements, "refinements") <= MOST_REFINEMENTS:
        raise UserError(f"{refinements} refinements were asked for; choose 0 to {MOST_REFINEMENTS}")
    picture.shape(model, plan, len(requests))
    sigmas = weakened(model.law.schedule, generate.make_sigmas(model, plan), float(picture.strength))
    if len(sigmas) == 1:
        raise UserError("a picture that is inverted up to strength 0 stays where it is; choose a strength up to 1")
    states: list[Tensor] = []
    seconds: list[Tensor] = []
    for batch in batches(requests, batch_size):
        done = sum(map(len, states))
        own = picture.rows(slice(done, done + len(batch)))
        denoiser, x = of_picture(model, batch, plan, helpers, own, sigmas)
        with torch.no_grad(), visiting(model, model.unet, *(other.unet for other in helpers.readers)):
            if exact:
                first, second = edict_up(denoiser, x, sigmas)
                seconds.append(second)
            else:
                first = walk_up(generate.make_sampler(model, plan), denoiser, x, sigmas, refinements)
            states.append(first)
    size = picture.image.shape[2], picture.image.shape[3]
    x, second = torch.cat(states), torch.cat(seconds) if exact else None
    return Inverted(x, float(sigmas[0]), size, settings, float(picture.strength), second)


def of_picture(
    model: Model, requests: Sequence[Request], plan: Plan, helpers: Helpers, picture: Picture, sigmas: Tensor
) -> tuple[Denoiser, Tensor]:
    """The denoiser of `requests`, and the pictures' state (B, C, h, w) at the last level of the grid."""
    helpers.check(plan)
    shape = picture.shape(model, plan, len(requests))
    with torch.no_grad(), visiting(model, model.codec.autoencoder):
        planes = Noise().planes(model, shape, len(requests))
        latent = solver_state(latent_of(model, plan, picture.image))
        denoiser, _ = generate.make_denoiser(model, requests, plan, helpers, shape, planes)
    return denoiser, latent / float(model.law.schedule.alpha(sigmas[-1]))
