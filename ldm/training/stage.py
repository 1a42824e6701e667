"""What a training is, as the loop sees it: networks with optimizers, endless batches, losses, and what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor, nn

from ldm.config import OptimizerConfig
from ldm.training.draws import Draws


class Batches(Protocol):
    """Endless batches: dataclasses of tensors and lists with this process' part of a batch, `key` and `epoch`."""

    quarantined: set[str]  # shards that this process could not have, by name

    @property
    def events(self) -> Sequence[str]:
        """What of them the log of a new run begins with."""
        ...

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
    average: Callable[..., Any] | None = None  # the module with its averaged weights, to be asked: the loop lends it


class Judge(Protocol):
    """What sends a run back to an earlier state when it has gone wrong; all processes judge the same means, and so come
    to the same end. Its own state is saved with the run's."""

    start: int  # a step whose state is kept, whatever loop.save_every
    good: int  # the last step that went well: a run goes back to its state, or the newest before it

    def __call__(self, step: int, means: Mapping[str, float]) -> str:
        """What went wrong by the means of a log line, in words; empty if nothing did."""
        ...

    def stricter(self, wrong: str) -> Self:
        """What it is to be after going back for what went `wrong`. Raises UserError when that has been too often."""
        ...

    def go_on(self, stricter: Self, back: bool) -> str:
        """Be so; `back`: this is now as it was at the earlier state, else there was none. What changes, in words."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stage(Protocol):
    """What a training is, as the loop sees it."""

    players: dict[str, Player]

    @property
    def judge(self) -> Judge | None:
        """Who is asked at each line of the log, where there is one."""
        ...

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
