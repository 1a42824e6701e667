"""The prediction that guidance leads away from, kept for a sampler that looks at it (ldm/sampling/cfg_pp.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Branches


class Seen:
    """The same Branches, and `unguided`, a Denoiser of branch 1.

    The last evaluation is remembered, so `unguided` right after the guided prediction, with the very same tensors,
    costs nothing. It evaluates where that took branch 0 alone (scale 1, outside an interval), and for other tensors.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        each = self._branches(x, sigma, count)
        if len(each) > 1:
            self._last = (x, sigma, each[1])
        return each

    def unguided(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, h, w), () or (B,) -> x0 (B, C, h, w) of branch 1."""
        if self._last is None or self._last[0] is not x or not torch.equal(self._last[1], sigma):
            self(x, sigma, 2)
        assert self._last is not None
        return self._last[2]
