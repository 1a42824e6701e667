"""A LoRA, trained in a loop that one can read: from pictures in other colours the model learns these colours.

python examples/lora.py [lora.png [optimizer steps]]
"""

import sys
import tempfile
from pathlib import Path

import torch

import ldm
from ldm.adapters.low_rank import AdaptedUNet
from ldm.checkpoints.lora import save_lora
from ldm.conditioning.condition import Condition
from ldm.diffusion import precondition
from ldm.generate import conditions
from ldm.image_io import grid, save_png
from ldm.jobs import Ask

output, steps = sys.argv[1] if len(sys.argv) > 1 else "lora.png", int(sys.argv[2]) if len(sys.argv) > 2 else 100
things = ["heart", "apple", "cat face", "dog face", "grinning face", "basketball", "sun", "strawberry"]
asked = ["a red heart, twemoji", "a pizza, flat emoji", "a fox, flat emoji"]

model = ldm.load("icons", device="cpu")  # where its training here is
before = model.txt2img(asked, steps=15, cfg=3, seed=3)
prompts = [f"a {thing}, noto emoji" for thing in things]
with torch.no_grad():
    examples = model.txt2img(prompts, steps=12, cfg=3, seed=1)[:, [2, 0, 1]]  # red is green, green blue, blue red
    latents = model.codec.encode(examples)
    told = conditions(model, [Ask(prompt) for prompt in prompts])

lora = AdaptedUNet(model.unet, rank=4, alpha=4, layers="transformer")
optimizer = torch.optim.AdamW(lora.parameters(), lr=2e-3)
schedule = model.law.schedule
for step in range(steps):
    rows = torch.randint(len(latents), (4,))
    sigma = schedule.sigma(torch.rand(4) * (schedule.steps - 1)).float()
    x0, condition = latents[rows], Condition(**{name: part[rows] for name, part in told.parts().items()})
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    denoised = precondition(lambda x, t, condition=condition: lora(x, t, condition), model.law)(x, sigma)
    loss = ((denoised - x0).square().mean((1, 2, 3)) * (1 + sigma**-2)).mean()  # v's own: Salimans & Ho 2022
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    save_lora(Path(folder) / "colours.safetensors", lora.lora(), model.unet, model.text)
    after = (
        ldm.load("icons").adapted({Path(folder) / "colours.safetensors": 1.0}).txt2img(asked, steps=15, cfg=3, seed=3)
    )
save_png(grid(torch.cat([before, after]), columns=6, labels=["before", "", "", "after", "", ""]), output)
