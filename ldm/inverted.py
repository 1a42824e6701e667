"""From a picture to the noise that a model draws it from: a start, to draw from again with other words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm import generate
from ldm.backends.sparing import visiting
from ldm.diffusion import Denoiser
from ldm.errors import UserError
from ldm.helpers import Helpers
from ldm.jobs import Plan, Request, Settings, batches
from ldm.jobs.values import whole
from ldm.sampling import weakened
from ldm.sampling.inversion import edict, edict_up
from ldm.sampling.inversion import invert as walk_up
from ldm.sampling.step import solver_state
from ldm.start import Draws, Noise, Picture, Placed, latent_of

if TYPE_CHECKING:
    from ldm.model import Model

MOST_REFINEMENTS = 20


@dataclass(frozen=True, eq=False)
class Inverted:
    """Pictures walked up to where they begin; drawing from here with the same settings and prompts gives them again.

    `x`: (B, C, h, w), float64, at `sigma`, the first level of the grid at `strength`.
    `second`: the other state of an exact inversion, which comes down by a sampler of its own (sampling.inversion).
    `size`: (H, W) of the pictures. `settings`: what they were inverted with.
    """

    x: Tensor
    sigma: float
    size: tuple[int, int]
    settings: Settings
    strength: float = 1.0
    second: Tensor | None = None

    def rows(self, rows: slice) -> Inverted:
        """Those of some of the pictures."""
        return replace(self, x=self.x[rows], second=None if self.second is None else self.second[rows])

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]:
        """As `Picture.shape`."""
        shape = Picture(torch.zeros(len(self.x), 3, *self.size)).shape(model, plan, count)
        if shape != self.x.shape[1:]:
            raise UserError(
                f"the picture was inverted to a latent of {'x'.join(map(str, self.x.shape[1:]))}, and "
                f"{model.name or 'this model'} draws {'x'.join(map(str, shape))}; draw with the model that inverted it"
            )
        return shape

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None:
        """As `Noise.planes`."""
        return Noise().planes(model, shape, count)

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed:
        sigmas, x = weakened(model.law.schedule, sigmas, self.strength), self.x.to(model.device)
        if abs(float(sigmas[0]) - self.sigma) > 1e-6 * self.sigma:
            raise UserError(
                f"the picture was inverted up to sigma {self.sigma:g}, and this grid begins at {float(sigmas[0]):g}; "
                "draw with the settings that it was inverted with, the inverted picture's .settings"
            )
        if self.second is None:
            return x, sigmas, denoiser
        return x, sigmas, denoiser, edict(self.second.to(model.device))

    def paste(self, drawn: Tensor) -> Tensor:
        """`drawn` at the pictures' own size."""
        return drawn[..., : self.size[0], : self.size[1]]


def begin_of(start: Inverted | None, count: int) -> Inverted | None:
    """`start` for `count` pictures, of which one serves all. Raises UserError for what is none."""
    if start is None:
        return None
    if not isinstance(start, Inverted):
        raise UserError(f"the start is {start!r:.60}; give what model.invert found, or leave it out")
    if len(start.x) > 1:
        return start
    x, second = (None if part is None else part.expand(count, -1, -1, -1) for part in (start.x, start.second))
    return replace(start, x=x, second=second)


def invert(
    model: Model,
    requests: Sequence[Request],
    settings: Settings,
    helpers: Helpers,
    picture: Picture,
    refinements: int = 1,
    exact: bool = False,
    batch_size: int = 4,
) -> Inverted:
    """What `settings` draw `picture` from, told of `requests`, one for each picture, about or `exact`.

    Raises UserError for settings that draw noise on their way, and as `generate.sample`.
    """
    plan = settings.plan()
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
