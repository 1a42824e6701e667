"""Mean and covariance of features that come in batches, in float64, in memory that does not grow with their count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError


@dataclass(eq=False)
class Moments:
    """Count, mean (D,), and scatter (D, D): the sum of (x - mean)(x - mean)^T. Float64.

    Updated by the mean and the scatter of each batch (Chan et al. 1979), so no difference of large sums is ever taken;
    two of different processes merge the same way.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of (N, D)."""
        x = features.double().cpu()
        if not len(x):
            return cls.empty(x.shape[1])
        mean = x.mean(dim=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def update(self, features: Tensor) -> None:
        """Take in (N, D)."""
        self.merge(Moments.of(features))

    def merge(self, other: Moments) -> None:
        """Take in those of other features."""
        if other.count == 0:
            return
        count = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(shift, shift, alpha=self.count * other.count / count)
        self.mean = self.mean + shift * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased; raises UserError for fewer than 2 features."""
        if self.count < 2:
            raise UserError(f"{self.count} pictures have no covariance; give at least 2")
        return self.scatter / (self.count - 1)
