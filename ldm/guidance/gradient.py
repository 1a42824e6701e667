"""Denoiser -> Denoiser by a gradient: classifier guidance (Dhariwal & Nichol 2021), and CLIP guidance.

Tweedie's formula, D = x + sigma^2 grad_x log p_sigma(x), turns a change of the law into a change of the denoiser: for
p_sigma(x) p(y | x, sigma)^scale it is

    D' = D + scale sigma^2 grad_x log p(y | x, sigma).

In the chain's coordinates z = alpha x, where grad_z = grad_x / alpha and eps = (x - D) / sigma, this reads
eps' = eps - scale sqrt(1 - alpha_bar) grad_z log p(y | z), their algorithm 2.

Samplers run under torch.no_grad(); gradients are switched on in here, and what is returned carries none. Each
picture's gradient is its own as long as the callables keep the pictures of a batch apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.guidance.rule import Interval, check_interval, inside_interval

LogProbability = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma () or (B,)) -> log p(y | x, sigma) (B,), differentiable in x; y is closed over."""

Similarity = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [-1, 1] -> (B,), differentiable: how well each fits what it should show."""


def classifier_guidance(
    denoiser: Denoiser, log_probability: LogProbability, scale: float, interval: Interval | None = None
) -> Denoiser:
    """D + scale sigma^2 grad_x log p(y | x, sigma), the classifier having been trained on noisy latents.

    `scale` 1 with the exact posterior makes of the unconditional denoiser the conditional one. The gradient does not
    pass through `denoiser`, which costs one evaluation as without; it may be guided already.
    `interval`: (low, high], where to guide; the classifier is not evaluated where no level of the batch lies in it.

    Raises UserError for an interval without low < high.
    """
    check_interval(interval)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoiser(x, sigma)
        inside = inside_interval(sigma, interval)
        if scale == 0 or not inside.any():
            return x0
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(log_probability(leaf, sigma).sum(), leaf)
        return _moved(x0, gradient, scale, sigma, inside)

    return denoise


def clip_guidance(
    denoiser: Denoiser,
    decode: Callable[[Tensor], Tensor],
    similarity: Similarity,
    scale: float,
    interval: Interval | None = None,
) -> Denoiser:
    """D + scale sigma^2 grad_x similarity(decode(D(x, sigma))): guided by a network that knows clean pictures only.

    It is classifier guidance with similarity(decode(x0-hat)) for log p(y | x, sigma), the usual form of CLIP guidance
    (Crowson 2021; Bansal et al. 2023, "forward guidance"). The gradient passes through decoder and denoiser, so
    that at high noise, where x says little of x0, it is as small as what x says: dD/dx = Cov[x0 | x] / sigma^2. On
    Gaussian data and for a similarity linear in x0 the guided law is exactly p(x0) exp(scale similarity).

    `decode`: latent (B, C, h, w) -> pictures, such as `Codec.decode`; values it clamps have no gradient.
    `scale`: similarities that are cosines move little; CLIP's own logit scale times the cosine is a log-likelihood.
    Memory: the activations of denoiser and decoder for the whole batch, as in a training step. If `denoiser` is itself
    guided by a gradient, that correction counts as a constant here. `interval`: as in `classifier_guidance`; outside
    it nothing is decoded or differentiated.

    Raises UserError for an interval without low < high.
    """
    check_interval(interval)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inside = inside_interval(sigma, interval)
        if scale == 0 or not inside.any():
            return denoiser(x, sigma)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            x0 = denoiser(leaf, sigma)
            (gradient,) = torch.autograd.grad(similarity(decode(x0)).sum(), leaf)
        return _moved(x0.detach(), gradient, scale, sigma, inside)

    return denoise


def _moved(x0: Tensor, gradient: Tensor, scale: float, sigma: Tensor, inside: Tensor) -> Tensor:
    """x0 + scale sigma^2 gradient where `inside`; a level outside may be as large as a law's cut, so no 0 * inf."""
    moved = x0 + per_picture(scale * sigma**2, x0) * gradient.to(x0.dtype)
    return torch.where(per_picture(inside, x0).bool(), moved, x0)
