"""Another network under the same samplers: a small DiT (Peebles & Xie 2023), trained on discs, squares and crosses.

python examples/dit.py [dit.png [optimizer steps]]"""

import sys

import torch
from torch import nn

from ldm.conditioning.condition import Condition
from ldm.config import ScheduleConfig
from ldm.diffusion import bind, make_law, precondition
from ldm.guidance import cfg
from ldm.image_io import grid, save_png
from ldm.sampling import NoiseStream, dpmpp_2m, make_grid, start

output, steps = sys.argv[1] if len(sys.argv) > 1 else "dit.png", int(sys.argv[2]) if len(sys.argv) > 2 else 800


class DiT(nn.Module):
    """F(x, t, told) of pictures 16 x 16, by 16 patches; `prepare` is what a network does once for a trajectory."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patches, self.label = nn.Conv2d(3, width, 4, 4), nn.Embedding(4, width)  # the last label is "any"
        self.time, self.place = nn.Linear(64, width), nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks, self.out = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(width, 48)

    def prepare(self, told):
        return self.label(told.label)

    def forward(self, x, t, label):
        waves = t[:, None] * torch.exp(-torch.linspace(0, 9, 32))
        about = self.time(torch.cat([waves.cos(), waves.sin()], 1)) + label
        h = self.blocks(self.patches(x).flatten(2).mT + self.place + about[:, None])
        return nn.functional.pixel_shuffle(self.out(h).mT.unflatten(2, (4, 4)), 4)


law, network = make_law(ScheduleConfig(), "v", sigma_data=0.7), DiT()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
for _ in range(steps):
    along = (torch.arange(16) - torch.randint(5, 11, (2, 64, 1))).abs()
    x, y = along[0][:, None], along[1][..., None]
    shapes = torch.stack([x**2 + y**2 < 17, x.maximum(y) < 4, (x.minimum(y) < 1) & (x.maximum(y) < 5)])
    label, sigma = torch.randint(3, (64,)), torch.randn(64).mul(1.2).exp()
    x0 = torch.where(shapes[label, torch.arange(64)][:, None], 1.0, torch.rand(64, 3, 1, 1) - 1)
    label = torch.where(torch.rand(64) < 0.1, 3, label)  # some are not told, for guidance
    noisy = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    denoised = precondition(lambda x, t, label=label: network(x, t, network.label(label)), law)(noisy, sigma)
    loss = ((denoised - x0).square().mean((1, 2, 3)) * (1 + sigma**-2)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
told = [Condition(label=torch.arange(12) % 3), Condition(label=torch.full((12,), 3))]
sigmas, noise = make_grid(law.schedule, 20, "karras"), NoiseStream(range(12), (3, 16, 16))
denoiser = cfg(bind(network.eval().requires_grad_(False), told, law), 2.0)
*_, last = dpmpp_2m()(denoiser, start(noise.initial(), law.schedule, sigmas), sigmas, noise)
save_png(grid(last.x.float().clamp(-1, 1).repeat_interleave(3, 2).repeat_interleave(3, 3), columns=6), output)
