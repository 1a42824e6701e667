"""Draw pictures of prompts.

python scripts/txt2img.py --prompt "a red heart" --cfg 7.5
python scripts/txt2img.py --model runs/classes --label cat --label dog --cfg 3
python scripts/txt2img.py --from-file prompts.jsonl --n 4 --grid --out outputs/sheet
python scripts/txt2img.py --prompt "a red heart" --hires 2
accelerate-launch scripts/txt2img.py --from-file prompts.jsonl
python scripts/txt2img.py --reproduce outputs/00000.png
"""

from __future__ import annotations

from ldm.script import run

from ldm.arguments import Parser
from ldm.commands.drawing import draw, listed_samplers
from ldm.commands.order import ordered
from ldm.commands.words import add_many, drawing_parser, given_of
from ldm.errors import UserError
from ldm.jobs import Beginning

HIRES_STRENGTH = 0.6


def parser() -> Parser:
    made = drawing_parser(__doc__)
    add_many(made)
    add = made.add_argument_group("larger than the model was trained for").add_argument
    add(
        "--hires",
        dest="enlarge",
        type=float,
        metavar="FACTOR",
        help="draw at --width x --height, enlarge so many times, and draw again: one subject, where a picture begun at "
        "that size has several",
    )
    add(
        "--hires-strength",
        dest="strength",
        type=float,
        metavar="X",
        help=f"of the second time: 0 enlarges only, 1 forgets the first [{HIRES_STRENGTH}]",
    )
    add("--window", type=int, metavar="N", help="pixels that the network sees then at a time (default: all at once)")
    return made


def main() -> None:
    given = given_of(parser())
    if not listed_samplers(given):
        if {"strength", "window"} & set(given) and "enlarge" not in given:
            raise UserError("--hires-strength and --window are of the second drawing; give --hires FACTOR with them")
        draw(given, ordered(given, Beginning(strength=HIRES_STRENGTH if "enlarge" in given else 1.0)))


if __name__ == "__main__":
    run(main)
