"""Draw pictures that are like one: like a given picture, or like that of a seed.

python scripts/variations.py --init heart.png --n 8 --strength 0.5 --grid
python scripts/variations.py --prompt "a red heart" --seed 7 --amount 0.2 --n 8 --grid
python scripts/variations.py --reproduce outputs/00003.png --init heart.png

A picture that was drawn here knows its prompt. Of a seed, the noise is turned towards that of the seeds after it.
"""

from __future__ import annotations

from ldm.script import run

from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.order import ordered, varied
from ldm.commands.words import add_init, add_many, drawing_parser, given_of
from ldm.errors import UserError
from ldm.jobs import Beginning

USUAL = Beginning(strength=0.5)
AMOUNT = 0.2


def main() -> None:
    parser = drawing_parser(__doc__, "what the picture shows (default: what is in the file, or nothing in particular)")
    add = add_init(parser, USUAL, ["strength"])
    add("--amount", type=float, metavar="X", help=f"without --init: 0 is the seed's picture, 1 another's [{AMOUNT}]")
    add_many(parser)
    given = given_of(parser)
    if listed_samplers(given):
        return
    picture = "init" in given or "reproduce" in given
    other = "amount" if picture else "strength"
    if other in given:
        raise UserError(
            f"--{other} is for variations {'without' if picture else 'of'} --init; leave one of the two out"
        )
    draw(given, ordered(given, USUAL, needed=False) if picture else varied(given, given.get("amount", AMOUNT)))


if __name__ == "__main__":
    run(main)
