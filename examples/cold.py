"""Cold diffusion (Bansal et al. 2022): blur, large pixels and a mask in the noise's place, through the same trainer.

python examples/cold.py [cold.png [optimizer steps]]"""

import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d, interpolate

import ldm
from ldm.conditioning.condition import Condition
from ldm.config import DataConfig, DiffusionTraining, LoopConfig, OptimizerConfig, UNetConfig
from ldm.data.writing import write_shard
from ldm.image_io import grid, save_png, to_png
from ldm.training.loop import carry_out
from ldm.training.stage_two import diffusion_stage

SIDE = 16


def blur(x, s):
    """By a Gaussian of deviation 3 s pixels."""
    f = torch.fft.fftfreq(SIDE, device=x.device)
    return torch.fft.ifft2(torch.fft.fft2(x) * (-2 * (3 * torch.pi * s) ** 2 * (f**2 + f[:, None] ** 2)).exp()).real


def pixelate(x, s):
    """To squares of 1, 2, 4 and at s = 1 of 8 pixels a side, mixed between two of them."""
    fine = min(int(3 * s), 2)
    low, high = (interpolate(avg_pool2d(x, 2**k), SIDE) for k in (fine, fine + 1))
    return low.lerp(high, float(3 * s) - fine)


def mask(x, s):
    """By grey that spreads from the middle, with a deviation of 6 s pixels."""
    d = torch.arange(SIDE, device=x.device) - SIDE / 2 + 0.5
    return x * (1 - (-(d**2 + d[:, None] ** 2) / (2 * (6 * s + 1e-3) ** 2)).exp())


WAYS = {"blur": blur, "pixelate": pixelate, "mask": mask}


def cold(nets, x0, told, draws):
    """The objective: |R(D(x0, s), s) - x0| (equation 1), each picture degraded in one of the three ways."""
    severity, kind = 1 - draws.uniform("severity").float(), (3 * draws.uniform("kind")).long()
    ways = list(WAYS.values())
    x = torch.cat([ways[k](x[None], s) for x, s, k in zip(x0, severity, kind, strict=True)])
    return (nets.student(x, 1000 * severity.to(x), told) - x0).abs().flatten(1).mean(1), {}


def restored(restore, degrade, x, levels, improved=True):
    """Algorithm 2, x - D(R, s) + D(R, r): what R gets wrong cancels where D is linear in s. Else algorithm 1, D(R, r).

    restore(x, s) -> x0; degrade(x0, s) -> x; x at the first of the decreasing `levels`, of which the last is 0."""
    for s, r in pairwise(levels):
        x0 = restore(x, s)
        x = degrade(x0, r) + (x - degrade(x0, s) if improved else 0)
    return x


def shapes(count, seed):
    """Pictures (count, 3, SIDE, SIDE) in [-1, 1]: a disc, square or cross of one colour on another."""
    torch.manual_seed(seed)
    along = (torch.arange(SIDE) - torch.randint(5, SIDE - 5, (2, count, 1))).abs()
    x, y = along[0][:, None], along[1][..., None]
    forms = torch.stack([x**2 + y**2 < 18, x.maximum(y) < 4, (x.minimum(y) < 2) & (x.maximum(y) < 5)])
    form = forms[torch.randint(3, (count,)), torch.arange(count)][:, None]
    return torch.where(form, *(2 * torch.rand(2, count, 3, 1, 1) - 1))


def main(output="cold.png", steps=1000):
    with tempfile.TemporaryDirectory() as folder:
        images = enumerate(shapes(2000, seed=0))
        write_shard(
            Path(folder) / "shapes.tar", ((f"{number:04d}", {"png": to_png(image)}) for number, image in images)
        )
        settings = DiffusionTraining(
            output=f"{folder}/run",
            model=UNetConfig(3, 3, 32, (1, 2), 1, (), context_width=0),
            parameterization="x0",
            data=DataConfig(f"{folder}/shapes.tar", size=SIDE, caption="none", streams=1, workers=0),
            optimizer=OptimizerConfig(rate=2e-3, law="cosine", warmup=20),
            loop=LoopConfig(steps=steps, global_batch=32, ema=0.0, validate_every=10**6, sample_every=0),
        )
        carry_out(settings, partial(diffusion_stage, own=lambda model: cold))
        network = ldm.load(f"{folder}/run", device="cpu").unet
    told, x0 = Condition(vector=torch.zeros(6, 0)), shapes(6, seed=1)  # none of those that it was trained on
    levels, rows = torch.linspace(1, 0, 17), []
    for name, degrade in WAYS.items():
        with torch.no_grad():

            def restore(x, s):
                return network(x, 1000 * s.expand(len(x)), told)

            x = degrade(x0, levels[0])
            ways = restore(x, levels[0]), *(restored(restore, degrade, x, levels, i) for i in (False, True))
        errors = " ".join(f"{float((way - x0).square().mean().sqrt()):.3f}" for way in (x, *ways))
        print(f"{name}: RMSE given, restored at once, by algorithm 1, by algorithm 2: {errors}")
        rows += [image for some in zip(x, *ways, x0, strict=True) for image in some][:10]
    picture = torch.stack(rows).clamp(-1, 1).repeat_interleave(5, 2).repeat_interleave(5, 3)
    labels = ["given", "at once", "algorithm 1", "algorithm 2", "real"] * 6
    save_png(grid(picture, columns=10, labels=labels), output)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
