"""Blended latent diffusion (Avrahami et al. 2023): another thing in one place of a picture.

After each step the state outside the mask is the picture's own, noised to that level. (The library's masks put the
picture into x0 instead, which any sampler takes: ldm/guidance/keep.py.)

python examples/blended.py [blended.png]
"""

import sys
from itertools import pairwise

import torch

import ldm
from ldm.generate import branches_of
from ldm.guidance import cfg
from ldm.image_io import grid, save_png
from ldm.jobs import Ask
from ldm.sampling import NoiseStream, euler, make_grid

model = ldm.load("icons")
image = model.txt2img("a grinning face, noto emoji", steps=20, cfg=3, seed=3)
with torch.no_grad():
    latent = model.codec.encode(image.to(model.device)).double()
    mask = torch.zeros_like(latent[:, :1])
    mask[..., 9:14, 3:13] = 1  # the mouth, in pixels of the latent

    denoiser = cfg(branches_of(model, [[Ask("a loudly crying face, noto emoji")], [Ask("")]]), 5.0)
    noise = NoiseStream([7], tuple(latent.shape[1:]), model.device)
    sigmas = make_grid(model.law.schedule, 30)[6:]
    x = latent + float(sigmas[0]) * noise.initial()
    for sigma, sigma_next in pairwise(sigmas):
        (step,) = euler()(denoiser, x, torch.stack([sigma, sigma_next]), noise)
        known = latent + float(sigma_next) * noise(float(sigma), float(sigma_next))
        x = mask * step.x + (1 - mask) * known
    blended = model.codec.decode(x)

shown = torch.nn.functional.interpolate(mask.float(), image.shape[2:]).expand(-1, 3, -1, -1) * 2 - 1
sheet = grid(torch.cat([image, shown.cpu(), blended.cpu()]), columns=3, labels=["the picture", "mask", "blended"])
save_png(sheet, sys.argv[1] if len(sys.argv) > 1 else "blended.png")
