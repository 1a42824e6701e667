"""A guidance of one's own: a strong one without the part along the prediction, which burns the colours.

That part makes x0 larger, not another one (Sadat et al. 2024, "Eliminating oversaturation"). Two pictures each: cfg 3,
cfg 12, and 12 without that part.

python examples/guidance.py [guidance.png]
"""

import sys

import torch

import ldm
from ldm.image_io import grid, save_png


def across(scale: float):
    """A guide makes a denoiser of branches, which predict x0 (2, B, C, h, w) of prompt and negative prompt."""

    def guide(branches):
        def denoise(x, sigma):
            wanted, other = branches(x, sigma)
            step = wanted - other
            axes = (1, 2, 3)
            share = (step * wanted).sum(axes, keepdim=True) / wanted.square().sum(axes, keepdim=True)
            return wanted + (scale - 1) * (step - share * wanted)

        return denoise

    return guide


model = ldm.load("icons")
prompts = ["a red apple, flat emoji", "a dog face, noto emoji"]
drawn = [model.txt2img(prompts, steps=15, seed=1, **how) for how in ({"cfg": 3}, {"cfg": 12}, {"guide": across(12)})]
labels = ["cfg 3", "", "cfg 12", "", "12, across", ""]
save_png(grid(torch.cat(drawn), columns=6, labels=labels), sys.argv[1] if len(sys.argv) > 1 else "guidance.png")
