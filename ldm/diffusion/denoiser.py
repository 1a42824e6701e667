"""The one type between the network and the sampler, and how a network becomes it.

    Denoiser: (x, sigma) -> x0        x (B, C, h, w) = x0 + sigma n,  sigma () or (B,)

The schedule gives the network's inputs, c_in = alpha(sigma) and t(sigma), unless the parameterization has its own; the
parameterization turns its output into x0. The network runs in float32 or whatever precision it has inside; x may be
float64, and D is in x's dtype. A network with a learned variance has twice as many channels; D is made of the first
half, and only learned_variance.py looks at the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.parameterization import Parameterization, per_picture
from ldm.diffusion.schedule import TIME_UNIT, Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma () or (B,)) -> the expected x0 (B, C, h, w)."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_in (B, C, h, w) float32, t (B,) float32) -> F (B, C or 2 C, h, w); its conditioning, if any, is closed over."""

Outputs = Callable[[Tensor, Tensor, int], Tensor]
"""(x (B, C, h, w), sigma () or (B,), k) -> what the network puts out for the first k conditionings (k, B, ...)."""

C = TypeVar("C")
P = TypeVar("P")


class Branches(Protocol):
    """A network bound to K conditionings: index 0 the prompt's, 1 the unconditional or negative one, then any more."""

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        """(B, C, h, w), () or (B,) -> (K, B, C, h, w): each one's x0. `count` evaluates only the first `count`."""
        ...


def network_input(
    x: Tensor, sigma: Tensor, schedule: Schedule, parameterization: Parameterization
) -> tuple[Tensor, Tensor]:
    """What a network is given for `x` (B, C, h, w) at `sigma` () or (B,): (c_in x, time), both float32, time (B,).

    Outside the trained range the time is that of its nearer end.
    """
    if parameterization.c_noise is None:
        t = schedule.t(sigma)
    else:
        level = sigma.detach().cpu().double().clamp(schedule.sigma_min, schedule.sigma_max)
        t = TIME_UNIT * parameterization.c_noise(level)
    c_in = (parameterization.c_in or schedule.alpha)(sigma)
    return (per_picture(c_in, x) * x).to(torch.float32), t.to(torch.float32).to(x.device).expand(len(x))


def denoised(output: Tensor, x: Tensor, sigma: Tensor, parameterization: Parameterization) -> Tensor:
    """D of a network's `output` (..., B, C or 2 C, h, w) at `x` (B, C, h, w): of its first C channels."""
    return parameterization.denoised(output.narrow(1 - x.ndim, 0, x.shape[1]), x, sigma)


def precondition(network: Network, schedule: Schedule, parameterization: Parameterization) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, t), computed in x's dtype around a float32 network."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x_in, t = network_input(x, sigma, schedule, parameterization)
        return denoised(network(x_in, t), x, sigma, parameterization)

    return denoise


def bind(
    network: Callable[[Tensor, Tensor, P], Tensor],
    conditionings: Sequence[C],
    prepare: Callable[[Sequence[C]], P],
    schedule: Schedule,
    parameterization: Parameterization,
    one_batch: bool = True,
) -> Branches:
    """`network` on K conditionings, in one batch or, where memory is short, one after another.

    `network(x_in, t, prepared)` is evaluated on k B pictures; the k conditionings of a batch lie one after another
    (all pictures of the first, then all of the second). What a conditioning is does not matter here: `prepare` makes
    of k of them, each for B pictures, what the network takes for those k B pictures (it concatenates them, and may
    project the context's keys and values). It is called once for each set that is needed, not once for each step.
    """
    outputs = outputs_of(network, conditionings, prepare, schedule, parameterization, one_batch)

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        output = outputs(x, sigma, len(conditionings) if count is None else count)
        return denoised(output, x, sigma, parameterization)

    return branches


def outputs_of(
    network: Callable[[Tensor, Tensor, P], Tensor],
    conditionings: Sequence[C],
    prepare: Callable[[Sequence[C]], P],
    schedule: Schedule,
    parameterization: Parameterization,
    one_batch: bool,
) -> Outputs:
    """What `bind` evaluates, before it is made a denoiser; the arguments are those of `bind`."""
    kept: dict[tuple[int, int], P] = {}

    def prepared(start: int, stop: int) -> P:
        if (start, stop) not in kept:
            kept[start, stop] = prepare(conditionings[start:stop])
        return kept[start, stop]

    def outputs(x: Tensor, sigma: Tensor, count: int) -> Tensor:
        x_in, t = network_input(x, sigma, schedule, parameterization)
        if one_batch:
            repeats = (count, *(1,) * (x.ndim - 1))
            return network(x_in.repeat(repeats), t.repeat(count), prepared(0, count)).unflatten(0, (count, len(x)))
        return torch.stack([network(x_in, t, prepared(k, k + 1)) for k in range(count)])

    return outputs
