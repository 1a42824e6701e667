"""Draw the way between prompts, seeds or pictures, frame by frame, and as a film.

python scripts/interpolate.py --prompt "a red heart" --prompt "a red apple" --frames 16
python scripts/interpolate.py --prompt "a red heart" --seeds 3 9 --film gif apng --there-and-back
python scripts/interpolate.py --init heart.png apple.png --strength 0.5 --frames 9
python scripts/interpolate.py --reproduce outputs/00004.png --init heart.png apple.png

Contexts of prompts are mixed, noises of seeds along the sphere that they lie on, and pictures where they are noised to
the level of --strength (Ho et al. 2020): at 0 they are cross-faded, at 1 hardly anything is left of them.
"""

from __future__ import annotations

from ldm.script import run

from ldm.arguments import COUNT, POSITIVE
from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.film import film
from ldm.commands.order import between
from ldm.commands.words import add_init, drawing_parser, given_of
from ldm.jobs import Beginning

USUAL = Beginning(strength=0.5)
FRAMES, FPS = 16, 12


def main() -> None:
    parser = drawing_parser(__doc__, "given several times: from the first to the last; once: it stays", seed=False)
    add = add_init(parser, USUAL, ["strength"], several="two or more: the way goes from one to the next")
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="several: from one's noise to the next's; one: it stays [0]",
    )
    add("--frames", type=COUNT, metavar="N", help=f"pictures on the whole way, both ends included [{FRAMES}]")
    add("--film", nargs="+", choices=("gif", "apng"), help="write them as a moving picture too")
    add("--fps", type=POSITIVE, metavar="X", help=f"frames of it in a second [{FPS}]")
    add("--there-and-back", action="store_const", const=True, help="let it end where it began")
    add("--reproduce", metavar="FILE.png", help="draw this frame again, from the settings inside it")
    given = given_of(parser)
    if listed_samplers(given):
        return
    order = between(given, USUAL, given.get("frames", FRAMES))
    draw(given, order, film(given.get("film", ()), given.get("fps", FPS), given.get("there_and_back", False)))


if __name__ == "__main__":
    run(main)
