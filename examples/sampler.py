"""A sampler of one's own: Adams and Bashforth's method of order 2, beside Euler's with as many steps and with many.

python examples/sampler.py [sampler.png]
"""

import sys
from itertools import pairwise

import torch

import ldm
from ldm.image_io import grid, save_png
from ldm.sampling import Step


def adams_bashforth(denoiser, x, sigmas, noise):
    """Any generator of Steps is a sampler. dx / dsigma = (x - D) / sigma, by the slope now and the one before."""
    levels, last = sigmas.tolist(), None
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0 = denoiser(x, torch.tensor(sigma, dtype=torch.float64))
        slope, h = (x - x0) / sigma, sigma_next - sigma
        if last is None or sigma_next == 0:
            x = x + h * slope
        else:
            before, h_before = last
            x = x + h * (slope + h / (2 * h_before) * (slope - before))
        last = slope, h
        yield Step(index, len(levels) - 1, sigma, sigma_next, x, x0)


model = ldm.load("icons")
prompts = ["a red heart, twemoji", "a cat face, noto emoji"]
few = [
    model.txt2img(prompts, sampler=sampler, grid="karras", steps=6, cfg=3, seed=3)
    for sampler in ("euler", adams_bashforth)
]
many = model.txt2img(prompts, sampler="euler", grid="karras", steps=60, cfg=3, seed=3)
labels = ["euler, 6 steps", "", "this one, 6 steps", "", "euler, 60 steps", ""]
save_png(grid(torch.cat([*few, many]), columns=6, labels=labels), sys.argv[1] if len(sys.argv) > 1 else "sampler.png")
