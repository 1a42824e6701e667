"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copy of the floating-point parameters and buffers of `module`, in float32.

    After update n the decay is min(decay, (1 + n) / (10 + n)), so that a short run does not average its
    initialisation in (Tarvainen and Valpola 2017 use the same idea).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.average = {name: tensor.detach().float().clone() for name, tensor in self._live()}

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                yield name, tensor

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [tensor.detach().float() for _, tensor in self._live()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

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
            tensor.copy_(source[name])

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
