"""What the rules that compare predictions have in common: where in sigma they act, and rescaling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Branches, Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError

Interval = tuple[float, float]
"""(low, high): where low < sigma <= high."""


def guided(
    branches: Branches,
    count: int,
    rule: Callable[[Tensor], Tensor],
    rescale: float = 0.0,
    interval: Interval | None = None,
) -> Denoiser:
    """`rule` of the first `count` branches, (count, B, C, h, w) -> x0 (B, C, h, w).

    `rescale`: in [0, 1], the share of a result whose deviation over C, h, w is brought back to branch 0's, picture by
        picture (Lin et al. 2024, section 3.4; they take 0.7). They rescale the network's output, here it is x0, for
        guidance knows no parameterization. The two are the same for x0-networks, and for v-networks in the limit of
        large sigma (v = -x0), which is where over-exposure arises; an eps-network differs at every level.
    `interval`: where to guide; elsewhere branch 0 alone (Kynkaanniemi et al. 2024). A batch whose levels all lie
        outside costs one evaluation.

    Raises UserError for a rescale outside [0, 1] and an interval without low < high.
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"the guidance rescale is {rescale:g}; choose it between 0 and 1")
    check_interval(interval)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inside = inside_interval(sigma, interval)
        if not inside.any():
            return branches(x, sigma, 1)[0]
        predictions = branches(x, sigma, count)
        found = rule(predictions)
        if rescale:
            found = found * (1 - rescale + rescale * _deviation_ratio(predictions[0], found))
        return torch.where(per_picture(inside, x).bool(), found, predictions[0])

    return denoise


def check_interval(interval: Interval | None) -> None:
    """Raises UserError for an interval without low < high."""
    if interval is not None and not interval[0] < interval[1]:
        raise UserError(f"the guidance interval ({interval[0]:g}, {interval[1]:g}] is empty; give low < high in sigma")


def inside_interval(sigma: Tensor, interval: Interval | None) -> Tensor:
    """Whether each level lies in (low, high], sigma's shape; all do where there is no interval."""
    if interval is None:
        return torch.ones_like(sigma, dtype=torch.bool)
    return (sigma > interval[0]) & (sigma <= interval[1])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Each picture's inner product over C, h, w: (B, C, h, w) twice -> (B, 1, 1, 1)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _deviation_ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """(B, 1, 1, 1): deviation of `wanted` over that of `found`, each over its picture's C, h, w; 0 where both are 0."""
    axes = tuple(range(1, wanted.ndim))
    smallest = torch.finfo(found.dtype).tiny
    return wanted.std(dim=axes, keepdim=True) / found.std(dim=axes, keepdim=True).clamp(min=smallest)
