"""SDEdit (Meng et al. 2022): a few strokes of the brush are noised, and drawn from there; the strength says how far.

python examples/sdedit.py [sdedit.png]
"""

import sys

import torch
from PIL import Image, ImageDraw

import ldm
from ldm.image_io import grid, save_png
from ldm.inputs import as_images

strokes = Image.new("RGB", (128, 128), "white")
brush = ImageDraw.Draw(strokes)
brush.ellipse((20, 32, 108, 120), fill=(200, 30, 30))
brush.line((64, 36, 68, 8), fill=(110, 70, 40), width=8)
brush.ellipse((68, 8, 100, 26), fill=(60, 160, 60))

model = ldm.load("icons")
strengths = [0.3, 0.5, 0.7, 0.9]
drawn = [model.img2img(strokes, "a red apple, flat emoji", strength=s, steps=20, cfg=3, seed=2) for s in strengths]
labels = ["strokes", *(f"strength {s}" for s in strengths)]
sheet = grid(torch.cat([as_images(strokes), *drawn]), columns=5, labels=labels)
save_png(sheet, sys.argv[1] if len(sys.argv) > 1 else "sdedit.png")
