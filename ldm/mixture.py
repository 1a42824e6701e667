"""A start between two pictures: mixed from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion import Denoiser
from ldm.jobs import Plan
from ldm.sampling import weakened
from ldm.sampling.step import solver_state
from ldm.start import Draws, Picture, Placed, latent_of

if TYPE_CHECKING:
    from ldm.model import Model


@dataclass(frozen=True, eq=False)
class Mixture:
    """Two pictures noised to the level of a strength, mixed there, and drawn from there (Ho et al. 2020, figures 8, 9).

    The higher the level, the less of the two is left and the more the model makes up: from a cross-fade, at strength 0,
    to new pictures. `pair`: (2, 3, H, W) in [-1, 1]; `shares`: (B,) of the second one, for each request. The noise is
    the requests' own: where theirs lies between two seeds, each picture has its own noise, as in the paper, whose
    (1 - w) x_a + w x_b has less of it than its level, which the arc has not.
    """

    pair: Tensor
    shares: Sequence[float]
    strength: float

    def shape(self, model: Model, plan: Plan, count: int) -> tuple[int, int, int]:
        return self._whole().shape(model, plan, count)

    def notices(self, model: Model) -> tuple[str, ...]:
        return self._whole().notices(model)

    def planes(self, model: Model, shape: tuple[int, int, int], count: int) -> Tensor | None:
        return self._whole().planes(model, shape, count)

    def place(
        self, model: Model, plan: Plan, sigmas: Tensor, noise: Draws, denoiser: Denoiser, planes: Tensor | None
    ) -> Placed:
        sigmas = weakened(model.law.schedule, sigmas, self.strength)
        ends = solver_state(latent_of(model, plan, self.pair))
        shares = torch.tensor(self.shares, dtype=ends.dtype, device=ends.device).reshape(-1, 1, 1, 1)
        mixed = (1 - shares) * ends[:1] + shares * ends[1:]
        return mixed + float(sigmas[0]) * noise.initial(), sigmas, denoiser

    def paste(self, drawn: Tensor) -> Tensor:
        """`drawn` at the pictures' own size."""
        return self._whole().paste(drawn)

    def _whole(self) -> Picture:
        return Picture(self.pair[:1].expand(len(self.shares), -1, -1, -1), self.strength)
