"""An inverted picture as a start: the noise that a model draws it from; inverting.py finds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion import Denoiser
from ldm.errors import UserError
from ldm.jobs import Plan, Settings
from ldm.sampling import Sampler, weakened
from ldm.sampling.inversion import edict
from ldm.sampling.spacings import Grid
from ldm.sampling.step import solver_state
from ldm.start import Draws, Noise, Picture, Placed

if TYPE_CHECKING:
    from ldm.model import Model


@dataclass(frozen=True, eq=False)
class Inverted:
    """Pictures walked up to where they begin; drawing from here with the same settings and prompts gives them again.

    `x`: (B, C, h, w), float64, at `sigma`, the first level of the grid at `strength`.
    `second`: the other state of an exact inversion, which comes down by a sampler of its own (sampling.inversion).
    `size`: (H, W) of the pictures. `settings`: what they were inverted with, and `sampler` and `grid` where these were
    given as values.
    """

    x: Tensor
    sigma: float
    size: tuple[int, int]
    settings: Settings
    strength: float = 1.0
    second: Tensor | None = None
    sampler: Sampler | None = None
    grid: Grid | None = None

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
        sigmas, x = weakened(model.law.schedule, sigmas, self.strength), solver_state(self.x, model.device)
        if abs(float(sigmas[0]) - self.sigma) > 1e-6 * self.sigma:
            raise UserError(
                f"the picture was inverted up to sigma {self.sigma:g}, and this grid begins at {float(sigmas[0]):g}; "
                "draw with the settings that it was inverted with, the inverted picture's .settings"
            )
        if self.second is None:
            return x, sigmas, denoiser
        return x, sigmas, denoiser, edict(solver_state(self.second, model.device))

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
