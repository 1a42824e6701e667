"""Laws whose optimal denoiser E[x0 | x] is known, in float64: what the samplers are proved against.

Points are latents (B, 1, 1, d); nothing here uses the library's formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean (d,), covariance (d, d))."""

    mean: Tensor
    covariance: Tensor

    def gain(self, sigma: float) -> Tensor:
        """(d, d) G of E[x0 | x] = mean + G (x - mean), G = C (C + sigma^2)^-1."""
        noisy = self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
        return torch.linalg.solve(noisy, self.covariance).T

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.mean + (x - self.mean) @ self.gain(float(sigma)).T


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weights[k] N(means[k] (d,), deviation^2 I)."""

    weights: Tensor
    means: Tensor
    deviation: float

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = self.deviation**2 + float(sigma) ** 2
        points = x.flatten(1)
        logits = self.weights.log() - torch.cdist(points, self.means).square() / (2 * variance)
        nearest = logits.softmax(dim=1) @ self.means
        return (nearest + self.deviation**2 / variance * (points - nearest)).reshape(x.shape)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, d)"""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.deviation * noise


def three_dimensional() -> Gaussian:
    """A Gaussian with correlated coordinates of unequal deviations (0.4 to 1.6) and a mean off 0."""
    mixing = torch.tensor([[1.5, 0.2, 0.0], [0.3, 0.6, -0.2], [0.1, 0.4, 0.5]], dtype=torch.float64)
    return Gaussian(torch.tensor([0.7, -1.1, 0.2], dtype=torch.float64), mixing @ mixing.T)


def three_clusters() -> Mixture:
    """Three clusters of unequal weight in the plane, deviation 0.5, about 1.5 to 2.5 apart."""
    means = torch.tensor([[1.0, 0.0], [-0.8, 0.9], [-0.4, -1.2]], dtype=torch.float64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, 0.5)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 16) -> float:
    """Mean over `directions` in the plane of the 1-Wasserstein distance of the projections of a, b (n, 2)."""
    angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ axes).sort(dim=0).values - (b @ axes).sort(dim=0).values).abs().mean())
