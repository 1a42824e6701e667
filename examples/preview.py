"""A live preview without a callback: a trajectory is a generator, and each step knows what it expects to come out.

python examples/preview.py [preview.png]
"""

import sys
from dataclasses import replace

import torch

import ldm
from ldm.image_io import grid, save_png

model = ldm.load("icons")
output = sys.argv[1] if len(sys.argv) > 1 else "preview.png"

seen = []
for step in model.sample("a cat face, noto emoji", sampler="dpmpp_2m", steps=16, cfg=3, seed=5):
    if step.index % 2 == 1:
        expected = replace(step, x=step.x0, sigma_next=0.0)  # the clean latent that the denoiser sees in the noise
        seen.append(model.decode(expected))
        save_png(grid(torch.cat(seen), columns=8), output)  # here a window would be told; stopping is `break`
    print(f"step {step.index + 1} of {step.total}, noise {step.sigma_next:.2f}")
