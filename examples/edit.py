"""Inversion and edit: a picture is walked up to its noise, and drawn from there with another word.

python examples/edit.py [edit.png [picture.png "what it shows" "what it shall show"]]
"""

import sys

import torch

import ldm
from ldm.image_io import grid, save_png

model = ldm.load("icons")
if len(sys.argv) > 4:
    image, source, target = sys.argv[2:5]
else:
    source, target = "a red heart, twemoji", "a blue heart, twemoji"
    image = model.txt2img(source, steps=20, cfg=3, seed=4)

start = model.invert(image, source, steps=20, refinements=1)
again = model.txt2img(source, start=start)  # with the inversion's own settings, cfg 1: the picture comes back
plain = model.txt2img(target, start=start, cfg=4)  # the same noise and another word
with model.prompt_to_prompt(source, target, cross=0.8, itself=0.5):  # and attention as it was
    _, held = model.txt2img([source, target], start=start, cfg=4)

given = model.img2img(image, strength=0)  # what the autoencoder makes of it
labels = ["the picture", "drawn again", "another word", "with its layout"]
sheet = grid(torch.cat([given, again, plain, held[None]]), columns=4, labels=labels)
save_png(sheet, sys.argv[1] if len(sys.argv) > 1 else "edit.png")
