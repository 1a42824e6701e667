"""Draw a part of a picture anew, or what lies beyond its edges.

python scripts/inpaint.py --init cat.png --mask hat.png --prompt "a cat with a red hat"
python scripts/inpaint.py --init cut-out.png --prompt "a meadow"
python scripts/inpaint.py --init photo.jpg --mask face.png --only-masked 32 --feather 4 --prompt "a smiling face"
python scripts/inpaint.py --init cat.png --extend 0,32,0,0 --prompt "a cat beside a tree"
python scripts/inpaint.py --reproduce outputs/00000.png --init cat.png

White in the mask is drawn, black stays as it is, byte by byte; without one, what is transparent is drawn. Networks that
were made for inpainting are given mask and picture; of others the mask acts at each step.
"""

from __future__ import annotations

from ldm.script import run

from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.order import ordered
from ldm.commands.words import add_init, add_many, drawing_parser, given_of, need_init
from ldm.jobs import Beginning
from ldm.jobs.beginning import parse_sides

USUAL = Beginning()


def main() -> None:
    parser = drawing_parser(__doc__)
    add = add_init(parser, USUAL, ["strength", "feather", "only_masked"], mask=True)
    add(
        "--extend",
        type=parse_sides,
        metavar="LEFT,RIGHT,TOP,BOTTOM",
        help="pixels to add at the picture's sides, which are drawn: 0,32,0,0",
    )
    add_many(parser)
    given = given_of(parser)
    if not listed_samplers(given):
        need_init(given)
        draw(given, ordered(given, USUAL, alpha="mask" not in given))


if __name__ == "__main__":
    run(main)
