"""Enlarge pictures, with details that the model draws, window by window.

python scripts/upscale.py --init heart.png --factor 4 --prompt "a red heart, flat emoji"
python scripts/upscale.py --init photos --factor 2 --strength 0.2 --out outputs/large
python scripts/upscale.py --reproduce outputs/00000.png --init heart.png

The network sees windows of the size it was trained at, at each step, and all of them are told the whole prompt: above a
strength of about 0.4 each draws a subject of its own.
"""

from __future__ import annotations

from ldm.script import run

from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.order import ordered
from ldm.commands.words import add_init, add_many, drawing_parser, given_of, need_init
from ldm.jobs import Beginning

USUAL = Beginning(strength=0.3, enlarge=2.0, window=0)


def main() -> None:
    parser = drawing_parser(__doc__, "what the picture shows (default: nothing in particular)")
    add = add_init(parser, USUAL, ["strength"])
    add("--factor", dest="enlarge", type=float, metavar="X", help=f"of both sides [{USUAL.enlarge:g}]")
    add("--window", type=int, metavar="N", help="pixels that the network sees at a time (default: as it was trained)")
    add_many(parser)
    given = given_of(parser)
    if not listed_samplers(given):
        need_init(given)
        draw(given, ordered(given, USUAL, needed=False))


if __name__ == "__main__":
    run(main)
