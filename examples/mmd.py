"""MMD fine-tuning (Aiello et al. 2023): the shipped model's four steps, without guidance, are taught as a whole.

A LoRA is trained through all steps to bring the pictures' features near those of pictures drawn in many guided steps.

python examples/mmd.py [mmd.png [optimizer steps]]"""

import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import ldm
from ldm.config import DataConfig, DiffusionTraining, LoopConfig, LoraConfig, OptimizerConfig
from ldm.data.writing import write_shard
from ldm.diffusion import precondition
from ldm.diffusion.fewer_steps import ddim_step
from ldm.image_io import grid, save_png, to_png
from ldm.metrics.spaces import make_space
from ldm.sampling import make_grid
from ldm.training.loop import carry_out
from ldm.training.stage_two import diffusion_stage

STEPS, GRID = 4, "trailing"
SEEDS = (1000, 1100, 1200, 1300)  # of the pictures that are compared; none of the training's
THINGS = ["red heart", "red apple", "sun", "star", "strawberry", "dog face", "basketball", "tomato"]


def mmd(a, b):
    """The unbiased estimate of MMD^2 between features (N, D), (M, D), with the kernel distance's (x y / D + 1)^3."""
    among, others, across = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within = (among.sum() - among.trace()) / (n * (n - 1)) + (others.sum() - others.trace()) / (m * (m - 1))
    return within - 2 * across.mean()


def chain(network, law, told, n):
    """`n` (B, C, h, w) -> x0, in STEPS steps of DDIM, with gradients."""
    sigmas = make_grid(law.schedule, STEPS, GRID)
    denoiser = precondition(lambda x, t: network(x, t, told), law)
    x = n * float(law.schedule.start_scale(sigmas[0]))
    for s, r in pairwise(sigmas):
        x = ddim_step(denoiser, x, s.expand(len(x)), r.expand(len(x)))
    return x


def finetune(features):
    """model -> the objective: MMD^2 between the features of latents drawn from noise and of the batch's own latents."""

    def of_model(model):
        def objective(nets, x0, told, draws):
            drawn = chain(nets.student, model.law, told, draws.normal("noise", x0.shape[1:]))
            with torch.no_grad():
                real = features(model, x0)
            return mmd(features(model, drawn), real).expand(len(x0)), {}

        return objective

    return of_model


def main(output="mmd.png", steps=24):
    space = make_space("efficientnet-lite0")
    prompts = [f"a {thing}, {style} emoji" for thing in THINGS for style in ("noto", "flat")]
    with tempfile.TemporaryDirectory() as folder:
        model = ldm.load("icons", device="cpu")
        real = torch.cat([model.txt2img(prompts, steps=10, cfg=3, seed=100 * k) for k in range(4)])
        write_shard(
            Path(folder) / "real.tar",
            (
                (f"{number:04d}", {"png": to_png(image), "txt": prompts[number % len(prompts)].encode()})
                for number, image in enumerate(real)
            ),
        )
        settings = DiffusionTraining(
            init="icons",
            output=f"{folder}/run",
            lora=LoraConfig(rank=16, layers="all"),
            data=DataConfig(f"{folder}/real.tar", size=128, streams=1, workers=0),
            optimizer=OptimizerConfig(rate=1e-3, warmup=5, law="cosine"),
            loop=LoopConfig(steps=steps, global_batch=16, ema=0.0, log_every=5, validate_every=10**6, sample_every=0),
        )
        own = finetune(lambda model, latent: space.network(model.codec.decode(latent).cpu()))
        carry_out(settings, partial(diffusion_stage, own=own))
        tuned = ldm.load("icons", device="cpu").adapted(f"{folder}/run/lora.safetensors")
    rows = []
    for name, which, cfg in (("4 steps", model, 1), ("4 guided steps", model, 3), ("4 steps, tuned", tuned, 1)):
        ways = [which.txt2img(prompts, seed=s, cfg=cfg, steps=STEPS, sampler="ddim", grid=GRID) for s in SEEDS]
        drawn = torch.cat(ways)
        with torch.no_grad():
            distance = mmd(space.network(drawn), space.network(real))
        print(f"{name}: MMD^2 x 1000 from pictures of 10 guided steps: {1000 * distance:.1f}")
        rows.append(drawn[:16])
    save_png(grid(torch.cat([*rows, real[:16]]), columns=16), output)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
