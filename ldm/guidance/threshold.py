"""Denoiser -> Denoiser: keep x0 in the data's range (Saharia et al. 2022, "Imagen", section 2.3).

A large guidance scale drives x0 beyond what data looks like, and the sampler on from there. Pixels have a range to be
kept in, [-1, 1], so `bound` is 1. Latents have none: they are scaled to unit variance, `bound` counts these deviations,
and one that clips the data's own tails changes good pictures too. Thresholding comes last, after all guidance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError


def static_threshold(denoiser: Denoiser, bound: float = 1.0) -> Denoiser:
    """x0 clipped to [-bound, bound]. Raises UserError for a bound that is not positive."""
    _check_bound(bound)
    return lambda x, sigma: denoiser(x, sigma).clamp(-bound, bound)


def dynamic_threshold(denoiser: Denoiser, bound: float = 1.0, percentile: float = 0.995) -> Denoiser:
    """x0 clipped to [-s, s] and divided by s / bound, with s the `percentile` of |x0|, picture by picture.

    Where s <= bound the picture stays as it is, values beyond the bound being clipped to it: s = max(s, bound). So
    what is saturated is pulled inwards as a whole, instead of flattened at the bound. `percentile`: in (0, 1], between
    order statistics linear; at 1 nothing is clipped, only divided.

    Raises UserError for a bound that is not positive and a percentile outside (0, 1].
    """
    _check_bound(bound)
    if not 0 < percentile <= 1:
        raise UserError(f"the threshold's percentile is {percentile:g}; choose it above 0 and at most 1")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoiser(x, sigma)
        s = torch.stack([picture.abs().flatten().quantile(percentile) for picture in x0]).clamp(min=bound)
        s = s.reshape(-1, *(1,) * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -s), s) / (s / bound)

    return denoise


def _check_bound(bound: float) -> None:
    if not bound > 0:
        raise UserError(f"the threshold's bound is {bound:g}; choose a positive one: 1 for pixels, more for latents")
