"""Stable Diffusion XL's base and 3 medium in their full shapes, random numbers: time and memory, and against diffusers.

    python tests/equivalence/full_shape.py sdxl                                 the same numbers as diffusers', small
    python tests/equivalence/full_shape.py sdxl --alone --side 512              time and memory of ours
    python tests/equivalence/full_shape.py sd3

No test: it takes minutes and 7 GB of disk (float16). A directory of random weights is written, and opened by one
process after the other, first its towers and then its network, so that one of these has to fit in memory: 14 GiB at
most. --alone takes 16.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ldm
from ldm.checkpoints import export, sd3
from ldm.checkpoints.architectures import CLIP_L_XL, OPENCLIP_BIGG, SD_XL
from ldm.checkpoints.native import part_names
from ldm.checkpoints.networks import skeleton
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.encoder import Encoder
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.diffusion import bind, make_law
from ldm.guidance import cfg
from ldm.jobs import Ask, Settings
from ldm.model_config import AutoencoderConfig, MMDiTConfig, ModelConfig
from ldm.sampling import NoiseStream, ddim, finish, make_grid, start

SD_3 = sd3.completed(
    ModelConfig(
        AutoencoderConfig(latent_channels=16, latent_convs=False, shift=(sd3.SHIFT,), scale=(sd3.SCALE,)),
        text=replace(CLIP_L_XL, embed_dim=768),
        text_2=replace(OPENCLIP_BIGG, cleaning="plain"),
        unet=MMDiTConfig(),
    )
)
MODELS = {"sdxl": SD_XL, "sd3": SD_3}
HOW = {
    "sdxl": Settings(cfg=5.0, sampler="ddim", spacing="trailing"),  # of the scheduler that is written
    "sd3": Settings(cfg=5.0, sampler="euler", spacing="uniform"),
}
PROMPT, SEED, LEVEL = "two cats & a DOG, 4k!!", 4, 601.0


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers with which every layer passes on about what it is given, and none is left at 0 or 1."""
    if name == "positions":
        return torch.randn(shape) / 2
    if len(shape) > 1:
        return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape) / 10 + float(name.endswith("weight"))


def make(config: ModelConfig, folder: Path) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    torch.manual_seed(0)
    for part in part_names(config):
        shapes = {key: tuple(value.shape) for key, value in skeleton(part, config, folder).state_dict().items()}
        states[part] = {key: random_tensor(key, shape).half() for key, shape in shapes.items()}
    export.write(folder, config, states, "diffusers")


class Teller:
    """Says what a part took: by the clock, and of the processor, which is what counts where others work too."""

    def __init__(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def __call__(self, what: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        now = time.perf_counter(), time.process_time()
        wall, processor = (later - earlier for later, earlier in zip(now, self.begun, strict=True))
        print(f"  {what:18} {wall:7.1f} s, of the processor {processor:7.1f} s, peak {peak:5.1f} GiB", flush=True)
        self.begun = now


@torch.no_grad()
def whole(folder: Path, settings: Any, precision: Any) -> dict[str, Tensor]:
    """A picture, as a command draws it."""
    tell = Teller()
    model = ldm.load(folder, device="cpu", precision=precision)
    tell("opened")
    step = None
    for step in model.sample(PROMPT, seed=SEED, settings=settings):
        tell(f"step {step.index + 1}, guided")
    assert step is not None
    model.decode(step)
    tell("picture decoded")
    return {}


@torch.no_grad()
def ours(folder: Path, settings: Any) -> dict[str, Tensor]:
    """What the towers say, what the network makes of it at one level, and some guided steps."""
    tell = Teller()
    checkpoint = open_checkpoint(folder)
    config, size = checkpoint.config, (settings.height, settings.width)
    encoder = Encoder(checkpoint.load_towers(), config.encoder)
    told, not_told = (encoder([Ask(text, size=size, target=size)]) for text in (PROMPT, ""))
    del encoder
    tell("towers")
    assert config.schedule is not None and config.autoencoder is not None
    law = make_law(config.schedule, config.parameterization)
    network: Any = checkpoint.load("unet")
    tell("network opened")
    assert told.context is not None and told.vector is not None
    channels, factor = config.autoencoder.latent_channels, config.autoencoder.factor
    stream = NoiseStream([SEED], (channels, size[0] // factor, size[1] // factor))
    noise = stream.initial().float()
    found = {"context": told.context, "vector": told.vector, "network": network(noise, torch.tensor([LEVEL]), told)}
    tell("one evaluation")
    grid = make_grid(law.schedule, settings.steps, settings.spacing)
    denoiser = cfg(bind(network, [told, not_told], law), settings.cfg)
    *_, last = ddim()(denoiser, start(noise, law.schedule, grid), grid, stream)
    tell(f"{settings.steps} steps, guided")
    return {**found, "trajectory": finish(last.x, law.schedule, grid)}


@torch.no_grad()
def theirs(folder: Path, settings: Any) -> dict[str, Tensor]:
    declare_missing_operators()
    diffusers: Any = import_module("diffusers")
    tell = Teller()
    open_: Any = partial(diffusers.DiffusionPipeline.from_pretrained, folder, torch_dtype=torch.float32)
    kind = "unet" if (folder / "unet").is_dir() else "transformer"
    xl, towers = kind == "unet", ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    third = {} if xl else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = open_(**{kind: None}, **third)
    if not xl:  # its prompts ask the transformer how wide T5 is
        object.__setattr__(pipe, kind, SimpleNamespace(config=SimpleNamespace(joint_attention_dim=4096)))
    more: dict[str, Any] = {} if xl else {"prompt_2": None, "prompt_3": None}
    length = {} if xl else {"max_sequence_length": 77}  # zeros in the place of T5, as many as the reference has
    negative = {"negative_prompt": None if xl else ""}
    asked = {"prompt": PROMPT, "do_classifier_free_guidance": True, "device": "cpu"}
    texts = pipe.encode_prompt(**asked, **negative, **more, **length)
    context, _, pooled, _ = texts
    del pipe
    tell("towers")
    pipe = open_(**dict.fromkeys(towers), **third)
    pipe.set_progress_bar_config(disable=True)
    tell("network opened")
    network, size, t = getattr(pipe, kind), (settings.height, settings.width), torch.tensor([LEVEL])
    noise = NoiseStream([SEED], (network.config.in_channels, size[0] // 8, size[1] // 8)).initial().float()
    if xl:
        sizes = torch.tensor([[*size, 0, 0, *size]])
        f = network(noise, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        vector = torch.cat([pooled, network.add_time_proj(sizes.flatten()).reshape(1, -1)], dim=-1)
    else:
        f, vector = network(noise, context, pooled, t).sample, pooled
    tell("one evaluation")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    latent = pipe(
        **dict(zip(names, texts, strict=True)),
        latents=noise,
        num_inference_steps=settings.steps,
        guidance_scale=settings.cfg,
        height=size[0],
        width=size[1],
        output_type="latent",
    ).images
    tell(f"{settings.steps} steps, guided")
    return {"context": context, "vector": vector, "network": f, "trajectory": latent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of --alone")
    parser.add_argument("--alone", action="store_true", help="ours alone: time and memory")
    parser.add_argument("--folder", type=Path, help="where the weights are, or are written, and kept")
    parser.add_argument(
        "--part", choices=("make", "ours", "theirs", "whole"), help="of the work, for the processes it starts"
    )
    given = parser.parse_args()
    settings = replace(HOW[given.model], width=given.side, height=given.side, steps=given.steps)
    if given.part == "make":
        make(MODELS[given.model], given.folder)
    elif given.part:
        work = {"ours": ours, "theirs": theirs, "whole": partial(whole, precision=given.precision)}[given.part]
        torch.save(work(given.folder, settings), given.folder / f"{given.part}.pt")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = given.folder or Path(temporary) / given.model
            parts = ["make"] * (not (folder / "model_index.json").is_file())
            parts += ["whole"] if given.alone else ["ours", "theirs"]
            for part in parts:
                print(part, flush=True)
                words = [__file__, *sys.argv[1:], "--folder", folder, "--part", part]
                subprocess.run([sys.executable, *map(str, words)], check=True)
            if not given.alone:
                a, b = (torch.load(folder / f"{part}.pt") for part in ("ours", "theirs"))
                for name, value in a.items():
                    error = float((value - b[name]).norm() / b[name].norm())
                    print(f"{name:10} {tuple(value.shape)!s:18} relative difference {error:.2e}")


if __name__ == "__main__":
    main()
