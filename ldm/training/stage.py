"""What a training is, as the loop sees it: networks with optimizers, endless batches, losses, and what to show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ldm.config import OptimizerConfig
from ldm.training.draws import Draws


class Batches(Protocol):
    """Endless batches: dataclasses of tensors and lists with this process' part of a batch, `key` and `epoch`."""

    quarantined: set[str]  # shards that this process could not have, by name

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def describe(self) -> str: ...


@dataclass
class Player:
    """A network with an optimizer of its own. A GAN has two, everything else one."""

    module: nn.Module
    optimizer: OptimizerConfig
    averaged: bool = True


class Stage(Protocol):
    """What a training is, as the loop sees it. One with an adversary has a `guard` too (guard.py)."""

    players: dict[str, Player]

    @property
    def batches(self) -> Batches: ...

    def losses(
        self, batch: Any, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (player, mean loss of the micro-batch, what to log); each is back-propagated before the next.

        What to log are numbers (), and may be two rows (B,): the samples' own losses under meters.EACH_LOSS, and
        their noise levels under EACH_SIGMA. These name the samples of a step that goes wrong, and are logged by level.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Figures on held-out data; the players hold their averaged weights meanwhile."""
        ...

    def draw(self, output: Path, step: int) -> None:
        """Write pictures that show how far the run has come."""
        ...

    def export(self, output: Path, finished: bool) -> None:
        """Write what others read from `output`; the players hold their averaged weights meanwhile."""
        ...

    def describe(self) -> list[str]:
        """Lines of the plan that only the stage knows."""
        ...
