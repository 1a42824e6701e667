"""Beginning: from what a picture is drawn beside its noise, and which of it. No torch: a mistake is told at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError
from ldm.jobs.values import real, reals, whole
from ldm.ranges import MAX_SIDE, WEAKEST

MAX_FACTOR = 16


@dataclass(frozen=True)
class Beginning:
    """How a given picture is taken up; the picture itself and its mask stand beside this.

    Without a picture `enlarge` is of what is drawn at first: that is drawn again, enlarged, at `strength`.
    """

    strength: float = 1.0  # 0: the picture as it is; 1: from noise alone; between: so far back in time, all steps run
    enlarge: float = 1.0  # enlarge so many times before it is drawn
    window: int | None = None  # pixels that the network sees at a time, overlapping; 0: as trained; None: all at once
    extend: tuple[int, ...] = ()  # pixels to add, and to draw, at the left, right, top and bottom
    feather: int = 0  # pixels over which the drawn fades in behind the mask's edge; outside it nothing changes
    only_masked: int | None = None  # draw the mask and so many pixels around it alone, at the model's own size

    def check(self) -> Beginning:
        """The same in Python's own types; raises UserError for what makes no sense."""
        made = dataclasses.replace(
            self,
            strength=float(real(self.strength, "the strength")),
            enlarge=float(real(self.enlarge, "the factor")),
            extend=tuple(int(side) for side in reals(self.extend, "extend")),
            **{name: whole(value, name) for name, value in self._wholes().items()},
        )
        if not 0 <= made.strength <= 1:
            raise UserError(f"the strength is {made.strength:g}; choose it from 0 (as it is) to 1 (drawn anew)")
        if 0 < made.strength < WEAKEST:
            raise UserError(f"the strength is {made.strength:g}, which changes nothing; choose 0, or {WEAKEST} to 1")
        if not 1 <= made.enlarge <= MAX_FACTOR or not math.isfinite(made.enlarge):
            raise UserError(f"the factor is {made.enlarge:g}; choose it from 1 to {MAX_FACTOR}")
        if made.extend and (len(made.extend) != 4 or min(made.extend) < 0 or not any(made.extend)):
            raise UserError(
                f"--extend is {','.join(map(str, made.extend))}; give pixels for left,right,top,bottom, as 0,16,0,0"
            )
        for name, value in made._wholes().items():
            if not 0 <= value <= MAX_SIDE:
                raise UserError(f"{name.replace('_', '-')} is {value} pixels; choose between 0 and {MAX_SIDE}")
        return made

    def changed(self) -> dict[str, Any]:
        """What is not the default, for a picture's record."""
        usual = Beginning()
        plain = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if value != getattr(usual, name)}

    def _wholes(self) -> dict[str, Any]:
        named = {"window": self.window, "feather": self.feather, "only_masked": self.only_masked}
        return {name: value for name, value in named.items() if value is not None}


def parse_sides(word: str) -> tuple[int, ...]:
    """ "0,16,0,0" -> (0, 16, 0, 0); raises UserError for what is no list of whole numbers."""
    try:
        return tuple(int(side) for side in word.split(","))
    except ValueError:
        raise UserError(f"--extend is '{word[:60]}'; give pixels for left,right,top,bottom, as 0,16,0,0") from None
