"""Noise for each picture by itself, so that a seed means the same picture alone, in any batch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
