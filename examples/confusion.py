"""CONFusion (Horwitz & Hoshen 2022): a denoiser is tuned to say two bounds for each pixel, which then are calibrated.

python examples/confusion.py [confusion.png [optimizer steps]]"""

import math
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from scipy.stats import binom

import ldm
from ldm.conditioning.condition import Condition
from ldm.config import DataConfig, DiffusionTraining, LoopConfig, OptimizerConfig, UNetConfig
from ldm.data.writing import write_shard
from ldm.diffusion.parameterization import per_picture
from ldm.image_io import grid, save_png, to_png
from ldm.training.loop import carry_out
from ldm.training.objectives import output_of
from ldm.training.stage_two import diffusion_stage

SIDE, SIGMA = 16, 1.0  # pixels; the noise on the pictures, pixels being in [-1, 1]
ALPHA = DELTA = 0.1  # of the pixels at most so many lie outside, and the calibration fails at most so often


def bounds(output, law, x, sigma):
    """(lower, upper) (B, 3, h, w) in [0, 1]: both halves of the `output` of a network that has learned a variance."""
    halves = output.chunk(2, dim=1)
    return [(law.denoised(half, x, sigma) / 2 + 0.5).clamp(1e-3, 1) for half in halves]


def pinball(error, share):
    """The loss whose least mean is where `share` of the truth lies below: error = truth - bound."""
    return torch.maximum(share * error, (share - 1) * error)


def intervals(model):
    """The objective: the 5 % and 95 % quantiles of each pixel, given the picture under noise."""

    def objective(nets, x0, told, draws):
        sigma = torch.full((len(x0),), SIGMA)
        x = x0 + per_picture(sigma, x0) * draws.normal("noise", x0.shape[1:])
        low, high = output_of(nets.student, model.law, x, sigma, told).chunk(2, dim=1)
        low, high = (model.law.denoised(half, x, sigma) for half in (low, high))
        loss = pinball(x0 - low, ALPHA / 2) + pinball(x0 - high, 1 - ALPHA / 2)
        return loss.flatten(1).mean(1), {}

    return objective


def outside(truth, lower, upper, factor):
    """The share of each picture's values (N,) that lie outside [lower / factor, factor upper]; all in [0, 1]."""
    return ((truth < lower / factor) | (truth > factor * upper)).flatten(1).double().mean(1)


def improbable(risk, count):
    """Hoeffding-Bentkus: how probable a mean of so small a `risk` over `count` pictures is, were the true one ALPHA."""
    r = min(risk, ALPHA)
    distance = (r * math.log(r / ALPHA) if r else 0) + (1 - r) * math.log((1 - r) / (1 - ALPHA))
    return min(math.exp(-count * distance), math.e * binom.cdf(math.ceil(count * risk), count, ALPHA))


def calibrated(truth, lower, upper, factors):
    """The smallest of `factors` at which, and at all larger ones, the true risk is below ALPHA, sure to 1 - DELTA."""
    found = math.inf
    for factor in sorted(factors, reverse=True):
        if improbable(float(outside(truth, lower, upper, factor).mean()), len(truth)) > DELTA:
            break
        found = factor
    return found


def shapes(count, seed):
    """Pictures (count, 3, SIDE, SIDE) in [-1, 1]: a disc, square or cross of one colour on another."""
    torch.manual_seed(seed)
    along = (torch.arange(SIDE) - torch.randint(5, SIDE - 5, (2, count, 1))).abs()
    x, y = along[0][:, None], along[1][..., None]
    forms = torch.stack([x**2 + y**2 < 18, x.maximum(y) < 4, (x.minimum(y) < 2) & (x.maximum(y) < 5)])
    form = forms[torch.randint(3, (count,)), torch.arange(count)][:, None]
    return torch.where(form, *(2 * torch.rand(2, count, 3, 1, 1) - 1))


def main(output="confusion.png", steps=250):
    with tempfile.TemporaryDirectory() as folder:
        images = enumerate(shapes(2000, seed=0))
        write_shard(
            Path(folder) / "shapes.tar", ((f"{number:04d}", {"png": to_png(image)}) for number, image in images)
        )
        settings = DiffusionTraining(
            output=f"{folder}/denoiser",
            model=UNetConfig(3, 6, 32, (1, 2), 1, (), context_width=0),
            learned_variance=True,
            data=DataConfig(f"{folder}/shapes.tar", size=SIDE, caption="none", streams=1, workers=0),
            optimizer=OptimizerConfig(rate=2e-3, law="cosine", warmup=20),
            loop=LoopConfig(steps=steps, global_batch=32, ema=0.0, validate_every=10**6, sample_every=0),
        )
        carry_out(settings, diffusion_stage)  # an ordinary diffusion model, then tuned to say bounds
        tuned = replace(settings, init=settings.output, output=f"{folder}/bounds")
        carry_out(tuned, partial(diffusion_stage, own=intervals))
        model = ldm.load(tuned.output, device="cpu")
    x0 = shapes(1500, seed=1)  # none of those that it was trained on: 500 to calibrate with, the others to see it hold
    sigma, told = torch.full((len(x0),), SIGMA), Condition(vector=torch.zeros(len(x0), 0))
    x = x0 + SIGMA * torch.randn_like(x0)
    with torch.no_grad():
        said = bounds(output_of(model.unet, model.law, x, sigma, told), model.law, x, sigma)
    (fit, *fit_bounds), (real, *real_bounds) = zip(
        *(part.split((500, 1000)) for part in (x0 / 2 + 0.5, *said)), strict=True
    )
    factor = calibrated(fit, *fit_bounds, torch.linspace(0.5, 3, 251).tolist())
    for name, by in (("as the network says them", 1.0), (f"calibrated by {factor:.2f}", factor)):
        covered = 1 - float(outside(real, *real_bounds, by).mean())
        print(f"bounds {name}: {covered:.1%} of 1000 held-out pictures' values lie between")
    lower, upper = real_bounds[0] / factor, (real_bounds[1] * factor).clamp(max=1)
    rows = zip(real, x[500:] / 2 + 0.5, lower, upper, upper - lower, strict=True)
    picture = 2 * torch.stack([image for row in list(rows)[:6] for image in row]).clamp(0, 1) - 1
    labels = ["real", "given", "lower", "upper", "width"] * 6
    save_png(grid(picture.repeat_interleave(5, 2).repeat_interleave(5, 3), columns=10, labels=labels), output)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
