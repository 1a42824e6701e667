"""Classifier-free guidance (Ho & Salimans 2022), with rescale and interval."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Branches, Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError


def cfg(
    branches: Branches, scale: float, rescale: float = 0.0, interval: tuple[float, float] | None = None
) -> Denoiser:
    """u + scale (c - u), with c and u the x0 of branches 0 and 1 (a negative prompt stands in u's place).

    x0 is affine in the network's output with factors that depend on sigma alone, so guiding x0 is guiding eps or v.

    `scale`: 1 is the conditional model exactly, and evaluates it alone; 0 is the unconditional one.
    `rescale`: in [0, 1], the share of a result whose deviation over C, h, w is brought back to c's, picture by picture
        (Lin et al. 2024, section 3.4; they take 0.7). They rescale the network's output, here it is x0, for guidance
        knows no parameterization. The two are the same for x0-networks, and for v-networks in the limit of large
        sigma (v = -x0), which is where over-exposure arises; an eps-network differs at every level.
    `interval`: (low, high): guide where low < sigma <= high and take the conditional model alone elsewhere
        (Kynkaanniemi et al. 2024). A batch whose levels all lie outside costs one evaluation.

    Raises UserError for a rescale outside [0, 1] and an interval without low < high.
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"the guidance rescale is {rescale:g}; choose it between 0 and 1")
    if interval is not None and not interval[0] < interval[1]:
        raise UserError(f"the guidance interval ({interval[0]:g}, {interval[1]:g}] is empty; give low < high in sigma")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inside = torch.ones_like(sigma, dtype=torch.bool)
        if interval is not None:
            inside = (sigma > interval[0]) & (sigma <= interval[1])
        if scale == 1 or not inside.any():
            return branches(x, sigma, 1)[0]
        conditional, unconditional = branches(x, sigma, 2)
        guided = unconditional + scale * (conditional - unconditional)
        if rescale:
            guided = guided * (1 - rescale + rescale * _deviation_ratio(conditional, guided))
        return torch.where(per_picture(inside, x).bool(), guided, conditional)

    return denoise


def _deviation_ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """(B, 1, 1, 1): deviation of `wanted` over that of `found`, each over its picture's C, h, w; 0 where both are 0."""
    axes = tuple(range(1, wanted.ndim))
    smallest = torch.finfo(found.dtype).tiny
    return wanted.std(dim=axes, keepdim=True) / found.std(dim=axes, keepdim=True).clamp(min=smallest)
