"""Stage one's guard: a discriminator that spoils the reconstruction is turned down, from the last good state on.

An adversarial loss may win over the reconstruction and never let go. So once it plays, the reconstruction of every
log interval is held against the best one so far. Beyond `limit` times the best, the run goes back to a state from
before it went wrong, and the adversarial weight is halved from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FACTOR = 0.5  # of the adversarial weight, each time
MOST = 5  # times; more is no accident, and the run ends
FIGURES = ("l1", "perceptual")  # the reconstruction is the first of these that is logged


class Guard:
    """What it has seen. Every process judges the same means, so all come to the same end.

    limit: of the reconstruction over its best; start: the optimizer step at which the discriminator begins.
    """

    def __init__(self, limit: float, start: int) -> None:
        self.limit, self.start = limit, start
        self.weight = 1.0  # factor of the adversarial weight
        self.times = 0  # that the run went back
        self.best = float("inf")
        self.good = 0  # the last step at which the reconstruction was within half of what is allowed

    def judge(self, step: int, means: Mapping[str, float]) -> float:
        """How many times its best the reconstruction is, if that is beyond the limit; else 0."""
        figure = next((means[name] for name in FIGURES if name in means), None)
        if figure is None:
            return 0.0
        self.best = min(self.best, figure)
        if figure <= (1 + 0.5 * (self.limit - 1)) * self.best:
            self.good = step
        worse = figure > self.limit * self.best and step > self.start
        return figure / self.best if worse else 0.0

    def turn_down(self, before: Guard) -> None:
        """After going back, `before` being how this was before that: all is forgotten but how often that happened."""
        self.weight, self.times = FACTOR * before.weight, before.times + 1

    def forget(self) -> None:
        """Where there was nothing to go back to: what comes is held against what is, or each line would be too bad."""
        self.best = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "times": self.times, "best": self.best, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.times, self.best, self.good = (state[k] for k in ("weight", "times", "best", "good"))
