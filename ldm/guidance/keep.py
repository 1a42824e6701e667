"""Inpainting: what is known of a picture stays, whatever the denoiser would make of it."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser


def keep(denoiser: Denoiser, latent: Tensor, mask: Tensor) -> Denoiser:
    """`denoiser` where `mask` (B, 1, h, w) is 1, the known `latent` (B, C, h, w) where it is 0, mixed between.

    Every sampler moves x towards x0, so where x0 is the known latent x follows that latent's own noisy states, and the
    step to sigma 0 gives it exactly. Lugmayr et al. 2022 replace x by a noisy known picture at each step instead, which
    draws noise anew and fits no deterministic sampler.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        where = mask.to(x)
        return where * denoiser(x, sigma) + (1 - where) * latent.to(x)

    return denoise
