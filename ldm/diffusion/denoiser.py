"""The one type between the network and the sampler, and how a network becomes it.

    Denoiser: (x, sigma) -> x0        x (B, C, h, w) = x0 + sigma n,  sigma () or (B,)

A network's law (law.py) says what it is given and what its output means. The network runs in float32 or whatever
precision it has inside; x may be float64, and D is in x's dtype. A network with a learned variance has twice as many
channels; D is made of the first half, and only learned_variance.py looks at the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.law import Law

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


def precondition(network: Network, law: Law) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, t), computed in x's dtype around a float32 network."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return law.denoised(network(*law.input(x, sigma)), x, sigma)

    return denoise


def bind(
    network: Callable[[Tensor, Tensor, P], Tensor],
    conditionings: Sequence[C],
    prepare: Callable[[Sequence[C]], P],
    law: Law,
    one_batch: bool = True,
) -> Branches:
    """`network` on K conditionings, in one batch or, where memory is short, one after another.

    `network(x_in, t, prepared)` is evaluated on k B pictures; the k conditionings of a batch lie one after another
    (all pictures of the first, then all of the second). What a conditioning is does not matter here: `prepare` makes
    of k of them, each for B pictures, what the network takes for those k B pictures (it concatenates them, and may
    project the context's keys and values). It is called once for each set that is needed, not once for each step.
    """
    outputs = outputs_of(network, conditionings, prepare, law, one_batch)

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        output = outputs(x, sigma, len(conditionings) if count is None else count)
        return law.denoised(output, x, sigma)

    return branches


def outputs_of(
    network: Callable[[Tensor, Tensor, P], Tensor],
    conditionings: Sequence[C],
    prepare: Callable[[Sequence[C]], P],
    law: Law,
    one_batch: bool,
) -> Outputs:
    """What `bind` evaluates, before it is made a denoiser; the arguments are those of `bind`."""
    kept: dict[tuple[int, int], P] = {}

    def prepared(start: int, stop: int) -> P:
        if (start, stop) not in kept:
            kept[start, stop] = prepare(conditionings[start:stop])
        return kept[start, stop]

    def outputs(x: Tensor, sigma: Tensor, count: int) -> Tensor:
        x_in, t = law.input(x, sigma)
        if one_batch:
            repeats = (count, *(1,) * (x.ndim - 1))
            return network(x_in.repeat(repeats), t.repeat(count), prepared(0, count)).unflatten(0, (count, len(x)))
        return torch.stack([network(x_in, t, prepared(k, k + 1)) for k in range(count)])

    return outputs
