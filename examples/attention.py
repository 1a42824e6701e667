"""Attention maps: where in the picture the words of a prompt are looked at.

python examples/attention.py [attention.png]
"""

import sys

import torch
from torch.nn.functional import interpolate

import ldm
from ldm.image_io import grid, save_png

model = ldm.load("icons")
prompt = "a red apple with a green leaf, flat emoji"
with model.attention_maps() as maps:
    image = model.txt2img(prompt, steps=15, cfg=4, seed=1)

cells, labels = [image[0]], [""]
for word, heat in maps.words(prompt):
    heat = interpolate(heat[None, None], image.shape[2:], mode="bilinear")[0]
    heat = (heat - heat.min()) / (heat.max() - heat.min())  # each word by itself: what is small is seen too
    cells.append((image[0] + 1) * heat - 1)  # from black to the picture
    labels.append(word)
save_png(grid(torch.stack(cells), columns=6, labels=labels), sys.argv[1] if len(sys.argv) > 1 else "attention.png")
