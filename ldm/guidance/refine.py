"""A second model takes over where less noise is left (Podell et al. 2023, section 2.5): a switch of denoisers."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser


def refined(denoiser: Denoiser, refiner: Denoiser, below: float) -> Denoiser:
    """`denoiser` at sigma >= `below`, `refiner` at the others; both are of x = x0 + sigma n on the same latents.

    So the state is handed over as it is and no noise is added, whatever the sampler. A method of several evaluations
    a step may take one from each side of `below`, as it would of any denoiser.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        late = sigma < below
        if not bool(late.any()):
            return denoiser(x, sigma)
        if bool(late.all()):
            return refiner(x, sigma)
        return torch.where(late.view(-1, *[1] * (x.ndim - 1)).to(x.device), refiner(x, sigma), denoiser(x, sigma))

    return denoise
