"""How a network becomes a denoiser: by its law, and with the conditions that it is bound to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ldm.conditioning.condition import Condition, cat
from ldm.diffusion.denoiser import Branches, Denoiser, Network, Outputs
from ldm.diffusion.law import Law


def precondition(network: Callable[[Tensor, Tensor], Tensor], law: Law) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, t), computed in x's dtype around a float32 network of x_in and t."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return law.denoised(network(*law.input(x, sigma)), x, sigma)

    return denoise


def bind(network: Network, told: Sequence[Condition], law: Law) -> Branches:
    """`network` on K conditions of B pictures each, in one batch: all of the first condition, then all of the
    second. It prepares each set of conditions that is needed once, not once for each step.
    """
    outputs = outputs_of(network, told, law)

    def branches(x: Tensor, sigma: Tensor, count: int | None = None) -> Tensor:
        return law.denoised(outputs(x, sigma, len(told) if count is None else count), x, sigma)

    return branches


def outputs_of(network: Network, told: Sequence[Condition], law: Law) -> Outputs:
    """What `bind` evaluates, before it is made a denoiser; the arguments are those of `bind`."""
    kept: dict[int, Any] = {}

    def outputs(x: Tensor, sigma: Tensor, count: int) -> Tensor:
        if count not in kept:
            kept[count] = network.prepare(cat(told[:count]))
        x_in, t = law.input(x, sigma)
        repeats = (count, *(1,) * (x.ndim - 1))
        return network(x_in.repeat(repeats), t.repeat(count), kept[count]).unflatten(0, (count, len(x)))

    return outputs
