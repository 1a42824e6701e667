"""A residual branch as ControlNet's (Zhang et al. 2023): a small network reads an outline, and what it says of it is
added to the features on the U-Net's way down. Its last layers begin at zero, so at first nothing changes.

python examples/controlnet.py [controlnet.png [optimizer steps]]"""

import sys

import torch
from torch import nn

import ldm
from ldm.diffusion import precondition
from ldm.generate import conditions
from ldm.image_io import grid, save_png
from ldm.jobs import Ask
from ldm.unet.blocks import zeroed

output, steps = sys.argv[1] if len(sys.argv) > 1 else "controlnet.png", int(sys.argv[2]) if len(sys.argv) > 2 else 120
model = ldm.load("icons", device="cpu")  # where its training here is


class Branch(nn.Module):
    """A silhouette (B, 1, 128, 128) -> what is added at each level of the U-Net (B, C, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, 32, 16, 8, 4), nn.SiLU(), nn.Conv2d(32, 64, 3, padding=1), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(64, 192, 4, 2, 1), nn.SiLU())
        self.out = nn.ModuleList([zeroed(nn.Conv2d(64, 64, 1)), zeroed(nn.Conv2d(192, 192, 1))])

    def forward(self, silhouette):
        fine = self.fine(silhouette)
        return [self.out[0](fine), self.out[1](self.coarse(fine))]


branch, added = Branch(), [0.0, 0.0]
for place, level in enumerate(model.unet.down):
    level.stages[-1].register_forward_hook(lambda stage, inputs, h, place=place: h + added[place])
things = ["apple", "heart", "cat face", "dog face", "pizza", "sun", "strawberry", "basketball", "fox"]
with torch.no_grad():
    images = model.txt2img([f"a {thing}, flat emoji" for thing in things], steps=12, cfg=3, seed=1, n=2, batch_size=18)
    x0s, told = model.codec.encode(images), conditions(model, [Ask("")] * 8)
    hints = (images.min(1, keepdim=True).values < 0.7).float()
optimizer, schedule = torch.optim.AdamW(branch.parameters(), lr=1e-3), model.law.schedule
for _ in range(steps):
    rows = torch.randint(len(images), (8,))
    sigma, x0, added[:] = schedule.sigma(torch.rand(8) * (schedule.steps - 1)).float(), x0s[rows], branch(hints[rows])
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    denoised = precondition(lambda x, t: model.unet(x, t, told), model.law)(x, sigma)
    loss = ((denoised - x0).square().mean((1, 2, 3)) * (1 + sigma**-2)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
square = nn.functional.pad(torch.ones(1, 1, 80, 80), (24, 24, 24, 24))
sheet, prompts = [1 - 2 * square.expand(-1, 3, -1, -1)], ["a pizza, flat emoji", "an apple, flat emoji"]
for added[:] in (branch(square), [0.0, 0.0]):  # with it, the same for each row of a batch; and without
    with torch.no_grad():
        sheet.append(model.txt2img(prompts, steps=15, cfg=3, seed=3))
save_png(grid(torch.cat(sheet), columns=5, labels=["outline", "with it", "", "without", ""]), output)
