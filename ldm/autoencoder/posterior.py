"""The encoder's answer: a Gaussian for each latent value, independent of the others (Kingma & Welling 2014)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp() and the KL finite in float32, as Stable Diffusion has it


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(logvar)), both (B, C, h, w), unscaled. The logvar is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "logvar", self.logvar.clamp(*LOGVAR_RANGE))

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """The inverse of `moments`: (B, 2C, h, w), the means first."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    def moments(self) -> Tensor:
        """(B, 2C, h, w): what is stored of a posterior."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, h, w) from unit normals of that shape: mean + std * noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The likeliest latent, which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(posterior || N(0, I)) in nats, summed over C, h, w, in float32: (B,)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
