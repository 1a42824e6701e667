"""Regional prompts: what the left and the right of a picture show, by two denoisers and a soft mask between them.

python examples/regional.py [regional.png]
"""

import sys

import torch

import ldm
from ldm.generate import branches_of
from ldm.guidance import cfg
from ldm.image_io import save_png
from ldm.jobs import Ask, Settings

model = ldm.load("icons")
width, height, f = 256, 128, model.codec.factor


def told(prompt: str):
    """The model guided to `prompt`: (x, sigma) -> x0."""
    return cfg(branches_of(model, [[Ask(prompt)], [Ask("")]]), 4.0)


left, right = told("a strawberry, flat emoji"), told("a green apple, flat emoji")
ramp = torch.linspace(-width / f / 4, width / f / 4, width // f).clamp(-1, 1)  # over two latent pixels
mask = (1 - ramp) / 2


def both(x, sigma):
    return mask.to(x) * left(x, sigma) + (1 - mask.to(x)) * right(x, sigma)


image = model.txt2img(guide=lambda branches: both, steps=20, seed=2, settings=Settings(width=width, height=height))
save_png(image[0], sys.argv[1] if len(sys.argv) > 1 else "regional.png")
