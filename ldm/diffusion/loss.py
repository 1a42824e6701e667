"""The loss w(sigma) |D - x0|^2, computed on the network's own output as w c_out^2 |F - F*|^2.

A weight is one function of sigma whatever the parameterization; SNR is 1 / sigma^2:

    uniform   1 / c_out^2       plain |F - F*|^2: eps 1 / sigma^2, v 1 + 1 / sigma^2, x0 1
    snr       1 / sigma^2       equal to uniform eps for every parameterization (DDPM's L_simple)
    min_snr   min(1 / sigma^2, gamma)     (Hang et al. 2023); on F this is min(SNR, gamma) / SNR for eps and
                                          min(SNR, gamma) / (SNR + 1) for v
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.config import DiffusionLossConfig
from ldm.diffusion.parameterization import Parameterization, per_picture
from ldm.errors import UserError

WEIGHTS: dict[str, Callable[[DiffusionLossConfig, Parameterization, Tensor], Tensor]] = {
    "uniform": lambda config, parameterization, sigma: parameterization.c_out(sigma) ** -2,
    "snr": lambda config, parameterization, sigma: sigma**-2,
    "min_snr": lambda config, parameterization, sigma: (sigma**-2).clamp(max=config.min_snr_gamma),
}


def weight(config: DiffusionLossConfig, parameterization: Parameterization, sigma: Tensor) -> Tensor:
    """w(sigma), the weight of |D - x0|^2; any shape, sigma > 0. Raises UserError for an unknown `config.weight`."""
    if config.weight not in WEIGHTS:
        raise UserError(f"loss.weight is '{config.weight}'; choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[config.weight](config, parameterization, sigma)


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    n: Tensor,
    sigma: Tensor,
    config: DiffusionLossConfig,
    parameterization: Parameterization,
) -> Tensor:
    """The loss (B,) of the network's `output` F (B, C, h, w) for data `x0` and noise `n` (B, C, h, w) at `sigma` (B,).

    It is the mean over C, h, w, in x0's dtype. F is the network on `network_input(x0 + sigma n, sigma, schedule)`.
    """
    level = sigma.cpu().double()
    factor = weight(config, parameterization, level) * parameterization.c_out(level) ** 2
    error = output.to(x0.dtype) - parameterization.target(x0, n, sigma)
    return per_picture(factor, x0).flatten() * error.square().flatten(1).mean(dim=1)
