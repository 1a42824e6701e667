"""Moving averages of a network's weights: exponential, or with the power-function profiles of Karras et al. 2024."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.posthoc import exponent

Law = Callable[[int], float]  # number of the update, from 1 -> decay


def exponential(decay: float) -> Law:
    """min(decay, (1 + n) / (10 + n)) at update n, so that a short run does not average its initialisation in.

    Tarvainen and Valpola 2017 use the same idea.
    """
    return lambda n: min(decay, (1 + n) / (10 + n))


def power(width: float) -> Law:
    """(1 - 1 / n)^(gamma + 1) at update n, which gives weights of step tau the share tau^gamma (ibid., equation 127).

    `width` is the profile's deviation as a share of the run's length, sigma_rel, from 0 to 0.28.
    """
    gamma = exponent(width)
    return lambda n: (1 - 1 / n) ** (gamma + 1)


class EMA:
    """Averaged copy of the floating-point parameters and buffers of `module`, in float32.

    `law` is a decay for `exponential`, or the law itself. `on_cpu` keeps the average in the CPU's memory, pinned where
    there is a GPU, which costs a transfer of all weights at each update in place of the GPU's memory.
    """

    def __init__(self, module: nn.Module, law: float | Law, on_cpu: bool = False) -> None:
        self.module, self.updates = module, 0
        self.law = law if callable(law) else exponential(law)
        self.average = {}
        for name, tensor in self._live():
            copy = tensor.detach().float().clone()
            if on_cpu and copy.device.type != "cpu":
                copy = copy.cpu().pin_memory()
            self.average[name] = copy

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                yield name, tensor

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one step."""
        self.updates += 1
        decay = self.law(self.updates)
        average = [local(tensor) for tensor in self.average.values()]
        live = [local(tensor.detach()).float() for _, tensor in self._live()]
        if average and live[0].device != average[0].device:
            live = [tensor.to("cpu") for tensor in live]
        torch._foreach_lerp_(average, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def asked(self, *arguments: Any) -> Any:
        """The module's answer with the averaged weights; its own stay in place, and gradients go nowhere."""
        return torch.func.functional_call(self.module, self.average, arguments)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights; after it, the live ones again."""
        kept = {name: tensor.detach().clone() for name, tensor in self._live()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, tensor in self._live():
            local(tensor).copy_(local(source[name]))

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, tensor in self.average.items():
            local(tensor).copy_(local(state["average"][name]))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its share of a sharded one (FSDP), else all of it; the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
