"""Draw pictures again, after a prompt.

python scripts/img2img.py --init heart.png --prompt "a red apple, flat emoji" --strength 0.6
python scripts/img2img.py --init photos --prompt "a pencil drawing" --width 64 --out outputs/drawings
python scripts/img2img.py --model DEPTH-MODEL --init room.jpg --depth depth.png --prompt "a ruin" --strength 1
python scripts/img2img.py --reproduce outputs/00000.png --init heart.png

A folder, or several files, are a batch: each picture is drawn with the same seeds, and a run that was stopped goes on
where it was. It may be divided: accelerate-launch scripts/img2img.py ...
"""

from __future__ import annotations

from ldm.script import run

from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.order import ordered
from ldm.commands.words import add_init, add_many, drawing_parser, given_of, need_init
from ldm.jobs import Beginning

USUAL = Beginning(strength=0.75)


def main() -> None:
    parser = drawing_parser(__doc__)
    add = add_init(parser, USUAL, ["strength"])
    add("--depth", metavar="FILE", help="the picture's depth map, of a model that is told one: grey, larger is nearer")
    add_many(parser)
    given = given_of(parser)
    if not listed_samplers(given):
        need_init(given)
        draw(given, ordered(given, USUAL))


if __name__ == "__main__":
    run(main)
