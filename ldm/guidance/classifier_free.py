"""Classifier-free guidance (Ho & Salimans 2022), with rescale and interval, and autoguidance, which is its sibling."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Branches, Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.guidance.rule import Interval, guided


def cfg(branches: Branches, scale: float | Tensor, rescale: float = 0.0, interval: Interval | None = None) -> Denoiser:
    """u + scale (c - u), with c and u the x0 of branches 0 and 1 (a negative prompt stands in u's place).

    x0 is affine in the network's output with factors that depend on sigma alone, so guiding x0 is guiding eps or v.

    `scale`: 1 is the conditional model exactly, and evaluates it alone; 0 is the unconditional one. A tensor (B,) has
        one for each picture.
    `rescale`, `interval`: see `rule.guided`; outside the interval the conditional model stands alone.

    Raises UserError for a rescale outside [0, 1] and an interval without low < high.
    """

    def rule(both: Tensor) -> Tensor:
        each = per_picture(scale, both[0]) if isinstance(scale, Tensor) else scale
        return both[1] + each * (both[0] - both[1])

    denoise = guided(branches, 2, rule, rescale, interval)
    alone = not isinstance(scale, Tensor) and scale == 1
    return (lambda x, sigma: branches(x, sigma, 1)[0]) if alone else denoise


def autoguidance(
    branches: Branches, worse: Branches, scale: float, rescale: float = 0.0, interval: Interval | None = None
) -> Denoiser:
    """w + scale (c - w): away from what a worse model predicts for the same prompt (Karras et al. 2024).

    `branches` gives c and `worse` w, each as its index 0: bind both to the same conditioning. The worse model is a
    smaller or less trained one of the same data and latents; its schedule and parameterization are its own, since x
    and sigma mean the same to every denoiser. The rest is as in `cfg`, the worse model standing in u's place: scale 1
    is the better model exactly, and evaluates it alone.
    """

    def both(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        better = branches(x, sigma, 1)
        return better if count == 1 else torch.cat([better, worse(x, sigma, 1)])

    return cfg(both, scale, rescale, interval)
