"""The one type between the network and the sampler, and how a network becomes it.

    Denoiser: (x, sigma) -> x0        x (B, C, h, w) = x0 + sigma n,  sigma () or (B,)

The schedule gives the network's inputs, c_in = alpha(sigma) and t(sigma); the parameterization turns its output into
x0. The network runs in float32 or whatever precision it has inside; x may be float64, and D is in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.parameterization import Parameterization, per_picture
from ldm.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), sigma () or (B,)) -> the expected x0 (B, C, h, w)."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_in (B, C, h, w) float32, t (B,) float32) -> F (B, C, h, w); its conditioning, if any, is closed over."""

C = TypeVar("C")
P = TypeVar("P")


class Branches(Protocol):
    """A network bound to K conditionings: index 0 the prompt's, 1 the unconditional or negative one, then any more."""

    def __call__(self, x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        """(B, C, h, w), () or (B,) -> (K, B, C, h, w): each one's x0. `count` evaluates only the first `count`."""
        ...


def network_input(x: Tensor, sigma: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """What a network is given for `x` (B, C, h, w) at `sigma` () or (B,): (c_in x, t), both float32, t (B,)."""
    t = schedule.t(sigma).to(torch.float32).to(x.device)
    return (per_picture(schedule.alpha(sigma), x) * x).to(torch.float32), t.expand(len(x))


def precondition(network: Network, schedule: Schedule, parameterization: Parameterization) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, t), computed in x's dtype around a float32 network."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x_in, t = network_input(x, sigma, schedule)
        return parameterization.denoised(network(x_in, t), x, sigma)

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
    kept: dict[tuple[int, int], P] = {}

    def prepared(start: int, stop: int) -> P:
        if (start, stop) not in kept:
            kept[start, stop] = prepare(conditionings[start:stop])
        return kept[start, stop]

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        count = len(conditionings) if count is None else count
        x_in, t = network_input(x, sigma, schedule)
        if one_batch:
            k = count
            output = network(x_in.repeat(k, *(1,) * (x.ndim - 1)), t.repeat(k), prepared(0, k)).unflatten(
                0, (k, len(x))
            )
        else:
            output = torch.stack([network(x_in, t, prepared(k, k + 1)) for k in range(count)])
        return parameterization.denoised(output, x, sigma)

    return branches
