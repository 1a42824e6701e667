"""The kinds of change that a small file makes to a weight W, (out, in) or (out, in, kh, kw): a formula each.

    low rank     s up @ down                        LoRA (Hu et al. 2021); of convolutions LoCon
    Hadamard     s (a1 @ b1) * (a2 @ b2)            LoHa (Hyeon-Woo et al. 2022)
    Kronecker    s kron(w1, w2)                     LoKr (Edalati et al. 2022); each whole or a product
    difference   d                                  full fine-tuning, of biases and norms too
    magnitude    m (W + V) / |W + V| - W            DoRA (Liu et al. 2024) over any V of those above

s = alpha / rank, 1 where nothing says alpha. Between the two factors of a convolution's product there may be a core
(r, r, kh, kw), whose sides contract with theirs (a Tucker decomposition); the factors are then those of a 1 x 1 one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """What is added to a weight."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is a change of a weight of that shape. Nothing is computed before it says so."""
        ...

    def of(self, weight: Tensor) -> Tensor:
        """What it adds to `weight`, at scale 1, in its shape and on its device, float32."""
        ...


@dataclass(frozen=True)
class Turned:
    """A change of the transposed weight: of a matrix that is x W here and x W^T where the change was made."""

    change: Change

    def fits(self, shape: Sequence[int]) -> bool:
        return self.change.fits(shape[::-1])

    def of(self, weight: Tensor) -> Tensor:
        return self.change.of(weight.T).T


@dataclass(frozen=True)
class Product:
    """left (m, r) @ right (r, n), or left alone; with a core (r, q, kh, kw) and right (q, n) it is (m, n * kh * kw)."""

    left: Tensor
    right: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """As LyCORIS counts it, the rows of the right factor."""
        return len(self.left if self.right is None else self.right)

    @property
    def size(self) -> tuple[int, int] | None:
        """Of the matrix; None if the factors do not go together."""
        rows, inner = self.left.shape
        if self.right is None:
            return rows, inner
        sides = (inner, inner) if self.core is None else tuple(self.core.shape[:2])
        if sides != (inner, self.right.shape[0]):
            return None
        return rows, self.right.shape[1] * (1 if self.core is None else math.prod(self.core.shape[2:]))

    def value(self, device: torch.device) -> Tensor:
        """The matrix, float32. A core goes to the side where less comes of it: no more than weight or file hold."""
        left = self.left.to(device, torch.float32)
        if self.right is None:
            return left
        right = self.right.to(device, torch.float32)
        if self.core is None:
            return left @ right
        core = self.core.to(device, torch.float32)
        if len(left) * core.shape[1] < len(core) * right.shape[1]:
            left = torch.einsum("mr,rqkl->mqkl", left, core)
            return torch.einsum("mqkl,qn->mnkl", left, right).flatten(1)
        return left @ torch.einsum("rqkl,qn->rnkl", core, right).flatten(1)


@dataclass(frozen=True)
class Factors:
    """down (r, in) or (r, in, kh, kw); up (out, r) or (out, r, 1, 1); alpha: r makes the change up @ down itself."""

    down: Tensor
    up: Tensor
    alpha: float
    core: Tensor | None = None  # down is then (r, in, 1, 1)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def _product(self) -> Product:
        return Product(self.up.flatten(1), self.down.flatten(1), self.core)

    def fits(self, shape: Sequence[int]) -> bool:
        return self._product.size == _flat(shape)

    def of(self, weight: Tensor) -> Tensor:
        return ((self.alpha / self.rank) * self._product.value(weight.device)).reshape(weight.shape)


@dataclass(frozen=True)
class Hadamard:
    """scale * first * second, number by number."""

    first: Product
    second: Product
    scale: float

    def fits(self, shape: Sequence[int]) -> bool:
        return self.first.size == self.second.size == _flat(shape)

    def of(self, weight: Tensor) -> Tensor:
        product = self.first.value(weight.device) * self.second.value(weight.device)
        return (self.scale * product).reshape(weight.shape)


@dataclass(frozen=True)
class Kronecker:
    """scale * kron(first, second): `second` once for each number of `first`, times that number."""

    first: Product
    second: Product
    scale: float

    def fits(self, shape: Sequence[int]) -> bool:
        one, two = self.first.size, self.second.size
        return one is not None and two is not None and (one[0] * two[0], one[1] * two[1]) == _flat(shape)

    def of(self, weight: Tensor) -> Tensor:
        product = torch.kron(self.first.value(weight.device), self.second.value(weight.device))
        return (self.scale * product).reshape(weight.shape)


@dataclass(frozen=True)
class Difference:
    """The numbers themselves."""

    value: Tensor

    def fits(self, shape: Sequence[int]) -> bool:
        return self.value.ndim > 0 and _flat(self.value.shape) == _flat(shape)

    def of(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, torch.float32).reshape(weight.shape)


@dataclass(frozen=True)
class Magnitude:
    """W + `inner`, each of its rows (axis 0, the outputs) or columns (axis 1, the inputs) scaled to the length given.

    At a scale below 1 it is a way between W and that: at 0 it is W, as with all the others.
    """

    inner: Change
    lengths: Tensor  # (out,) or (in,)
    axis: int

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and len(shape) > 1 and self.lengths.numel() == shape[self.axis]

    def of(self, weight: Tensor) -> Tensor:
        weight = weight.to(torch.float32)
        direction = weight + self.inner.of(weight)
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        norm = direction.square().sum(others, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        lengths = self.lengths.to(weight.device, torch.float32).reshape(norm.shape)
        return lengths / norm * direction - weight


@dataclass(frozen=True)
class HalvesSwapped:
    """`inner`, of a weight whose rows stand there with the second half first."""

    inner: Change

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[0] % 2 == 0 and self.inner.fits(shape)

    def of(self, weight: Tensor) -> Tensor:
        return torch.cat(self.inner.of(torch.cat(weight.chunk(2)[::-1])).chunk(2)[::-1])


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Of a weight as a matrix: its outputs and the rest."""
    return shape[0], math.prod(shape[1:])
