"""How much a client may ask for. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.jobs import Plan
from ldm.ranges import Count, Positive, check

if TYPE_CHECKING:
    from ldm.web.job import Asked

LETTERS = 10_000  # of a prompt; no text tower reads a tenth of it
SETTINGS = 100_000  # letters of a job without its pictures, of which each value is looked at and may be quoted
SMALLEST_TILE = 64  # pixels; smaller ones make a decoding of minutes


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and all of them together."""

    most_pictures: Count = 16  # of one request
    most_steps: Count = 150  # of one request's sampler
    most_side: Count = 1024  # pixels, of what is drawn
    most_pixels: Count = 25_000_000  # of a picture that is sent, before it is decoded
    most_seconds: Positive = 600.0  # of one request's drawing, from when its turn comes
    most_waiting: Count = 100  # requests that wait for their turn
    client_waiting: Count = 75  # of them from one address
    most_megabytes: Count = 24  # of one request's body
    all_megabytes: Count = 256  # of the bodies of all requests that are not answered yet
    header_seconds: Positive = 5.0  # for a client to say what it wants
    slow_seconds: Positive = 20.0  # for a client to send all of a request, or to take a piece of an answer
    connections: Count = 256  # at a time
    client_connections: Count = 192  # of them from one address

    def __post_init__(self) -> None:
        check(self)

    def check(self, asked: Asked, plan: Plan) -> None:
        """Raise UserError for what is more than a client may ask for; before anything is made for each picture."""
        for what, count, most in (
            ("pictures", asked.n, self.most_pictures),
            ("steps", plan.steps, self.most_steps),
            ("pixels of width", plan.width or 0, self.most_side),
            ("pixels of height", plan.height or 0, self.most_side),
            ("letters of a prompt", len(asked.prompt) + len(asked.negative), LETTERS),
        ):
            if count > most:
                raise UserError(f"{count} {what} were asked for, and this server's limit is {most}; ask for fewer")
        if plan.tile is not None and plan.tile < SMALLEST_TILE:
            raise UserError(f"a tile of {plan.tile} pixels is too small here; choose {SMALLEST_TILE} or more, or none")
