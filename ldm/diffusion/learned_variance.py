"""Learned variance (Nichol & Dhariwal 2021, section 3.1): the network has a second output that says the reverse
steps' variance, as a place between the two that Ho et al. 2020 choose from (schedule.step_deviations).

    ln variance = f ln beta + (1 - f) ln beta-tilde,        f = (v + 1) / 2

The step is from level s to r < s, in x = x0 + sigma n at level r (the two differ from the chain's by
alpha_r^2 both, so f means the same in either coordinate). The first half of the network's
2 C channels is F as ever, the second is v. Only this file and whoever is given `LearnedVariance.fraction` know of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.diffusion.binding import outputs_of
from ldm.diffusion.denoiser import Network
from ldm.diffusion.law import Law
from ldm.diffusion.parameterization import per_picture
from ldm.diffusion.schedule import Schedule, step_deviations

Fraction = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma () or (B,)) -> v (B, C, h, w) in [-1, 1]: -1 is beta-tilde, 1 beta, geometric between."""


class LearnedVariance:
    """Branches (see denoiser.py) of a network with 2 C channels, and the `fraction` that a sampler steps with.

    The last evaluation is remembered, so `fraction` right after x0 was asked for, with the very same tensors, costs
    nothing; with others it evaluates the network.
    """

    def __init__(self, network: Network, told: Sequence[Condition], law: Law) -> None:
        """The arguments are those of `bind`."""
        self._outputs = outputs_of(network, told, law)
        self._count, self._law = len(told), law
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        """(B, C, h, w), () or (B,) -> (K, B, C, h, w): each condition's x0, or the first `count`."""
        output = self._outputs(x, sigma, self._count if count is None else count)
        second = split(output[0], x.shape[1])[1]
        if second is None:
            raise ValueError(
                f"the network puts out {output.shape[2]} channels for x of {x.shape[1]}, not twice as many"
            )
        self._last = (x, sigma, second)
        return self._law.denoised(output, x, sigma)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The Denoiser of the first condition."""
        return self(x, sigma, 1)[0]

    def fraction(self, x: Tensor, sigma: Tensor) -> Tensor:
        """v (B, C, h, w) in [-1, 1], in x's dtype, of the first condition; -1 is beta-tilde, 1 is beta.

        Training puts no bound on v (as in the paper); what lies outside is cut here.
        """
        if self._last is None or self._last[0] is not x or not torch.equal(self._last[1], sigma):
            self(x, sigma, 1)
        assert self._last is not None
        return self._last[2].to(x.dtype).clamp(-1, 1)


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """F (B, C, h, w), and v if `output` (B, C or 2 C, h, w) has one."""
    if output.shape[1] != 2 * channels:
        return output, None
    return output[:, :channels], output[:, channels:]


def mixed(v: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """v (B, ...) in [-1, 1] -> the logarithm of the variance, between two logarithms () or (B,)."""
    share = (v + 1) / 2
    return share * per_picture(highest, v) + (1 - share) * per_picture(lowest, v)


def variance_bound(v: Tensor, error: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
    """T L_t (B,), nats for each value, of a chain with learned variance; the mean over uniform levels is L_vlb - L_T.

    L_t is KL(q(x_r | x_s, x0) || p(x_r | x_s)) of the step from `sigma` (B,) to the level r before it. From the first
    level it is -ln p(x0 | x_1), a Gaussian density (latents are continuous) around D, whose variance lies between the
    second step's beta-tilde and the first beta, as in the paper, since the first beta-tilde is 0.

    v: (B, C, h, w), the network's second output. error: D - x0, (B, C, h, w). No gradient goes into it: L_vlb trains
    the variance alone, the mean is trained by the plain loss (their section 3.4).
    """
    level = sigma.detach().cpu().double()
    index = schedule.t(level).round().long()
    first = index == 0
    s = torch.where(first, schedule.sigmas[1], level)  # the first level borrows its lower end from the second step
    r = torch.where(first, schedule.sigmas[0], schedule.sigmas[(index - 1).clamp(min=0)])
    lowest, highest = (2 * deviation.log() for deviation in step_deviations(schedule.alpha, s, r))
    at_first = level.square().log() - torch.log1p(level.square())  # ln beta_1 = ln(1 - alpha_bar_1)
    lowest = torch.where(first, lowest - torch.log1p(r.square()), lowest)  # to z, which is x once r is 0
    highest = torch.where(first, at_first, highest)
    log_variance = mixed(v.to(error.dtype), lowest, highest)

    gain = torch.where(first, 1.0, 1 - (r / s).square())  # of the mean's error: mean = D + (r / s)^2 (x - D)
    square = (per_picture(gain, error) * error.detach()).square() / log_variance.exp()
    # KL of Gaussians with variances q and p: (ln p / q + q / p - 1 + square) / 2. The decoder has ln 2 pi p + square.
    ratio = per_picture(lowest, error) - log_variance
    divergence = torch.expm1(ratio) - ratio + square
    decoder = math.log(2 * math.pi) + log_variance + square
    chosen = torch.where(per_picture(first, error).bool(), decoder, divergence)
    return schedule.steps / 2 * chosen.flatten(1).mean(dim=1)
