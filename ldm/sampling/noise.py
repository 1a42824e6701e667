"""Noise for each picture by itself, so that a seed means the same picture alone, in any batch, on any device.

Two kinds, started from the same noise. A `NoiseStream` gives its next normals whatever the step: right for samplers
that want several independent draws at one level. A `BrownianPath` gives the step's own piece of one path for each
picture, so that more steps refine the same picture.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError

LEVELS = 16
"""How often a Brownian path bisects an octave of sigma: levels closer than 1e-5 of sigma are not told apart."""

OCTAVE = 2**LEVELS
"""Points of an octave."""


class Draws(Protocol):
    """The noise of a batch: that of the start, and that of each step."""

    def initial(self) -> Tensor: ...

    def __call__(self, sigma: float, sigma_next: float) -> Tensor: ...


class NoiseStream:
    """Unit normals (B, C, h, w) for B pictures, drawn on the CPU in float32 from one generator for each.

    The first draw of picture i is its start, the following ones go to the steps in order, so every sampler starts a
    seed from the same noise.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`seeds`: one for each picture; `shape`: (C, h, w); `device` and `dtype`: where and as what noise is given."""
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shape, self._device, self._dtype = tuple(shape), device, dtype
        self._initial = self._draw()

    def initial(self) -> Tensor:
        """(B, C, h, w) for the start state; the same whenever it is asked for."""
        return self._initial.clone()

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """(B, C, h, w) for the step from `sigma` to `sigma_next`: the stream's next, whatever the levels."""
        return self._draw()

    def _draw(self) -> Tensor:
        rows = [torch.randn(self._shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._dtype).to(self._device)


class BrownianPath:
    """Unit normals (B, C, h, w) that are the normalised increments of one Brownian path W for each of B pictures.

    The noise of a step depends on its interval alone, not on how many steps there are, nor on what was asked before.
    Increments over adjoining intervals are independent, those of overlapping ones rightly correlated, and each has
    variance 1 exactly.

    W runs in -log sigma. There the reverse SDE of x = x0 + sigma n is driven by sqrt(2) sigma dW, and a step's noise
    differs from its increment of W by the part of the step's own length in which x and D move: any smooth clock has the
    same limit, and samplers converge to it pathwise at order 1. (1 / sigma^2 would make a step exact were the data one
    point, sigma^2 were they spread far beyond sigma; log sigma lies between. On three clusters it had the smallest
    error of these and sigma itself with every sampler but dpmpp_sde.)

    W is never stored. Each octave of sigma has an increment of its own, and is bisected `LEVELS` times towards the
    point that is asked for by Levy's midpoint construction: given W at both ends, the middle is their mean plus a
    normal with a quarter of the length for variance. A point's normals come from a counter-based generator keyed by
    (seed, point), on the CPU, so they are the same whatever was asked before. Levels are rounded to the finest
    bisection, and so are the lengths that normalise.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """As of `NoiseStream`, which gives the same seeds the same start."""
        self._start = NoiseStream(seeds, shape, device, dtype)
        self._seeds, self._shape, self._device, self._dtype = tuple(seeds), tuple(shape), device, dtype
        # A step's end is the next one's beginning, so a step costs one descent, and its octaves one draw each.
        self._within = lru_cache(maxsize=4)(self._descend)

    def initial(self) -> Tensor:
        """(B, C, h, w) for the start state; the same whenever it is asked for."""
        return self._start.initial()

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """(B, C, h, w) for the step from `sigma` down to `sigma_next` > 0.

        Raises UserError for levels that do not decrease, that are 0, or that are too close to be told apart.
        """
        if not math.inf > sigma > sigma_next > 0:
            raise UserError(
                f"a Brownian path was asked for a step from sigma {sigma:g} to {sigma_next:g}; "
                "it needs finite levels that decrease and stay above 0"
            )
        start, end = point(sigma), point(sigma_next)
        if start == end:
            raise UserError(f"the levels {sigma:.9g} and {sigma_next:.9g} are too close for a Brownian path; drop one")
        first, last = start // OCTAVE, end // OCTAVE
        increment = self._within(end) - self._within(start)
        for octave in range(first, last):
            increment += self._normals((octave + 1) * OCTAVE)
        return (increment / math.sqrt((end - start) / OCTAVE)).to(self._dtype).to(self._device)

    def _descend(self, target: int) -> Tensor:
        """(B, C, h, w) float64: W at a point, less W at the beginning of its octave; an octave has length 1."""
        low = target - target % OCTAVE
        high = low + OCTAVE
        at_low = torch.zeros((len(self._seeds), *self._shape), dtype=torch.float64)
        if target == low:
            return at_low
        at_high = self._normals(high).double()  # an octave's own increment is named by its end
        while True:
            middle = (low + high) // 2
            deviation = math.sqrt((high - low) / OCTAVE) / 2
            at_middle = torch.lerp(at_low, at_high, 0.5).add_(self._normals(middle), alpha=deviation)
            if middle == target:
                return at_middle
            if target < middle:
                high, at_high = middle, at_middle
            else:
                low, at_low = middle, at_middle

    def _normals(self, at: int) -> Tensor:
        """(B, C, h, w) float32: each picture's normals of a point, side by side: numpy lets go of the interpreter.

        Philox takes a key of 128 bits; torch's CPU generator keeps 32 bits of its seed, too few to name every point.
        """

        def row(seed: int) -> Tensor:
            key = hashlib.blake2b(f"{seed} {at}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            return torch.from_numpy(generator.standard_normal(self._shape, dtype=np.float32))

        return torch.stack(list(_workers().map(row, self._seeds) if len(self._seeds) > 1 else map(row, self._seeds)))


@cache
def _workers() -> ThreadPoolExecutor:
    """A thread for each core, begun when it is first needed."""
    return ThreadPoolExecutor(os.cpu_count(), "noise")


def point(sigma: float) -> int:
    """A path's point at `sigma`: -log2 sigma in units of the finest bisection."""
    return round(-math.log2(sigma) * OCTAVE)
