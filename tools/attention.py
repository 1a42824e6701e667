"""Draw a picture and, word by word, where the network looked at the prompt: bright where it looked most.

python tools/attention.py --prompt "a red apple with a green leaf, flat emoji" --output attention.png

A word's map is the mean over its tokens, the heads, the layers and the steps, between its own least and most, which are
printed: a word that is hardly looked at has a map too. `--by-step 4` makes a row for each quarter of the way.
"""

from __future__ import annotations

from ldm.script import run

from pathlib import Path
from typing import TYPE_CHECKING

from ldm.arguments import Parser
from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model", default="icons", help="shipped name, checkpoint directory or file, or hf:owner/name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cfg", type=float, default=7.5, help="guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", default="", help="only layers with this in their names: down, middle, up; all")
    parser.add_argument("--size", type=int, default=32, help="of the largest maps, in positions of the features")
    parser.add_argument("--by-step", type=int, default=1, help="rows, each of as many steps")
    parser.add_argument("--output", type=Path, default=Path("attention.png"))
    given = parser.parse_args()
    if not 1 <= given.by_step <= max(given.steps, 1):
        raise UserError(f"--by-step is {given.by_step}; choose 1 to {given.steps}, the number of steps")
    if given.size < 1:
        raise UserError(f"--size is {given.size}; choose 1 or more positions")

    import torch  # takes seconds, and a mistake is told before

    import ldm
    from ldm.image_io import grid, save_png

    model = ldm.load(given.model)
    with model.attention_maps(given.size) as maps:
        image = model.txt2img(given.prompt, steps=given.steps, cfg=given.cfg, seed=given.seed)[0]
    evaluations = len({each.evaluation for each in maps.kept})
    cells, labels = [], []
    for row in range(given.by_step):
        part = slice(row * evaluations // given.by_step, (row + 1) * evaluations // given.by_step)
        words = maps.words(given.prompt, layers=given.layers, steps=part)
        cells += [image, *(lit(image, heat) for _, heat in words)]
        labels += [f"steps {part.start + 1}-{part.stop}" if given.by_step > 1 else "", *(word for word, _ in words)]
    found = maps.words(given.prompt, layers=given.layers)
    for word, heat in found:
        print(f"{word:20} {float(heat.min()):.4f} to {float(heat.max()):.4f}")
    save_png(grid(torch.stack(cells), columns=len(cells) // given.by_step, labels=labels), given.output)
    print(f"{given.output}: {tuple(found[0][1].shape) if found else 'no'} positions, {evaluations} evaluations")


def lit(image: Tensor, heat: Tensor) -> Tensor:
    """(3, H, W) in [-1, 1], as bright as `heat` (h, w) is large, from black at its least to the picture at its most."""
    from torch.nn.functional import interpolate

    heat = interpolate(heat[None, None], list(image.shape[1:]), mode="bilinear")[0]
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
    return (image + 1) * heat - 1


if __name__ == "__main__":
    run(main)
