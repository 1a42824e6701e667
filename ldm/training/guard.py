"""Stage one's guard: a discriminator that spoils the reconstruction is turned down, from the last good state on.

An adversarial loss may win over the reconstruction and never let go. So once it plays, the reconstruction of every
log interval is held against the best one so far. Beyond `limit` times the best, the run goes back to a state from
before it went wrong, and the adversarial weight is halved from there on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

from ldm.errors import UserError

FACTOR = 0.5  # of the adversarial weight, each time
MOST = 5  # times; more is no accident, and the run ends
FIGURES = ("l1", "perceptual")  # the reconstruction is the first of these that is logged


class Guard:
    """A `Judge` (stage.py), and what it has seen.

    limit: of the reconstruction over its best; start: the optimizer step at which the discriminator begins.
    """

    def __init__(self, limit: float, start: int) -> None:
        self.limit, self.start = limit, start
        self.weight = 1.0  # factor of the adversarial weight
        self.times = 0  # that the run went back
        self.best = float("inf")
        self.good = 0  # the last step at which the reconstruction was within half of what is allowed

    def __call__(self, step: int, means: Mapping[str, float]) -> str:
        """How many times its best the reconstruction was, if that is beyond the limit."""
        figure = next((means[name] for name in FIGURES if name in means), None)
        if figure is None:
            return ""
        self.best = min(self.best, figure)
        if figure <= (1 + 0.5 * (self.limit - 1)) * self.best:
            self.good = step
        if step <= self.start or figure <= self.limit * self.best:
            return ""
        return f"the reconstruction was {figure / self.best:.2f} times its best at step {step}"

    def stricter(self, wrong: str) -> Self:
        if self.times == MOST:
            raise UserError(
                f"{wrong} once more, though the adversarial weight is {self.weight:g} of what was asked; lower "
                "loss.adversarial or optimizer.rate"
            )
        other = copy.copy(self)
        other.weight, other.times = FACTOR * self.weight, self.times + 1
        return other

    def go_on(self, stricter: Self, back: bool) -> str:
        self.weight, self.times = stricter.weight, stricter.times
        if not back:  # what comes is held against what is, or each line would be too bad
            self.best = float("inf")
        return f"the adversarial weight is {self.weight:g} of loss.adversarial from here on"

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "times": self.times, "best": self.best, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.times, self.best, self.good = (state[k] for k in ("weight", "times", "best", "good"))
