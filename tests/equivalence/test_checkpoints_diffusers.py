"""What diffusers saves, loaded here, computes the same; what is exported here, diffusers opens and draws the same.

Weights are random. In float64 (the time embedding in float32, as both have it) what remains is the map of names and
settings; in float32 also the rounding.
"""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm.checkpoints import export
from ldm.checkpoints.opening import open_checkpoint
from ldm.jobs import Settings
from ldm.sampling import NoiseStream, ddim, finish, make_grid, start

from . import stable_diffusion as sd
from .stable_diffusion import relative

PROMPTS = ["a red heart", "", "two cats & a DOG, 4k!!"]
VERSIONS = [pytest.param(1, id="v1"), pytest.param(2, id="v2")]


@pytest.fixture(scope="module", params=VERSIONS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A pipeline and the directory that it wrote."""
    pipe = sd.pipeline(request.param)
    pipe.set_progress_bar_config(disable=True)
    yield pipe, sd.save(pipe, tmp_path_factory.mktemp("peer") / f"v{request.param}")


def outputs_there(pipe: Any, side: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the peer's networks make of inputs that are the same whenever this is called; x is (3, C, side, side)."""
    unet, vae, text = (part.to(dtype) for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    with torch.no_grad():
        tokens = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        context = text(tokens).last_hidden_state
        x, t, image = inputs(unet.config.in_channels, side, dtype)
        moments = vae.quant_conv(vae.encoder(image))
        found = {"encode": moments, "decode": vae.decode(moments[:, :4]).sample}
        return found | {"tokens": tokens, "text tower": context, "U-Net": unet(x, t, context).sample}


def errors_here(path: Path, side: int, dtype: torch.dtype, there: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each of our networks' relative error against the peer's, on the peer's own inputs to it."""
    checkpoint = open_checkpoint(path)
    with torch.no_grad():
        tower = checkpoint.load("text", dtype=dtype)
        tokens, _ = tower.tokenize(PROMPTS)
        assert torch.equal(tokens, there["tokens"])
        made = {"text tower": tower(tokens)}
        unet = checkpoint.load("unet", dtype=dtype)
        x, t, image = inputs(unet.config.in_channels, side, dtype)
        made["U-Net"] = unet(x, t, there["text tower"])
        autoencoder = checkpoint.load("autoencoder", dtype=dtype).autoencoder
        assert autoencoder is not None
        made["encode"] = autoencoder.to_moments(autoencoder.encoder(image))
        made["decode"] = autoencoder.decode(there["encode"][:, :4])
    assert all(value.dtype == dtype for value in made.values())
    return {name: relative(value, there[name]) for name, value in made.items()}


def inputs(channels: int, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (3, channels, side, side), t (3,), and pictures (2, 3, 4 side, 4 side)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, channels, side, side, generator=generator).to(dtype)
    image = (torch.rand(2, 3, 4 * side, 4 * side, generator=generator) * 2 - 1).to(dtype)
    return x, torch.tensor([1.0, 500.0, 981.0]), image


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_the_networks(small: tuple[Any, Path], dtype: torch.dtype, most: float) -> None:
    pipe, path = small
    errors = errors_here(path, 8, dtype, outputs_there(pipe, 8, dtype))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float32)
    assert max(errors.values()) <= most, errors


WORDS, SEED = ("a red heart on a table", "blurry"), 4


def drawn_there(pipe: Any, side: int) -> torch.Tensor:
    """The peer's latent of the words, from the noise of the seed."""
    noise = NoiseStream([SEED], (4, side, side)).initial().float()
    options = {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "latent", "negative_prompt": WORDS[1]}
    pixels = side * pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    latent = pipe(WORDS[0], latents=noise, height=pixels, width=pixels, **options).images
    assert bool(latent.std() > 0.1)
    return latent


def drawn_here(model: ldm.LatentDiffusion, side: int) -> torch.Tensor:
    """Ours: 20 steps of guided DDIM on the original grid."""
    pixels = side * model.codec.factor
    settings = Settings(cfg=7.5, steps=20, sampler="ddim", spacing="leading", width=pixels, height=pixels)
    *_, last = model.sample(WORDS[0], negative=WORDS[1], seed=SEED, settings=settings)
    return finish(last.x, model.law.schedule, torch.tensor([last.sigma_next]))


@pytest.fixture(scope="module")
def loaded(small: tuple[Any, Path]) -> ldm.LatentDiffusion:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # everything is in the files: nothing to assume, nothing to say
        return ldm.load(small[1], device="cpu")


def test_a_guided_trajectory(small: tuple[Any, Path], loaded: ldm.LatentDiffusion) -> None:
    assert relative(drawn_here(loaded, 8), drawn_there(small[0], 8)) <= 1e-4


def test_a_guided_trajectory_in_float64(small: tuple[Any, Path], loaded: ldm.LatentDiffusion) -> None:
    """Networks in float64 and one table of alphas, ours, on both sides: what is left is the map and the sampler.

    In use the network's input is float32 (`network_input`), so here the loop around it is written out.
    """
    pipe, path = small
    checkpoint, schedule = open_checkpoint(path), loaded.law.schedule
    unet, tower = checkpoint.load("unet", dtype=torch.float64), checkpoint.load("text", dtype=torch.float64)
    noise = NoiseStream([SEED], (4, 8, 8)).initial().double()
    with torch.no_grad():
        contexts = [tower(tower.tokenize([words])[0]) for words in WORDS]

        def guided(network: Any, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            conditional, unconditional = (network(z, t.float(), context) for context in contexts)
            return unconditional + 7.5 * (conditional - unconditional)

        def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            output = guided(unet, schedule.alpha(sigma) * x, schedule.t(sigma).expand(1))
            return loaded.law.parameterization.denoised(output, x, sigma)

        sigmas = make_grid(schedule, 20, "leading")
        *_, last = ddim()(denoiser, start(noise, schedule, sigmas), sigmas, NoiseStream([SEED], (4, 8, 8)))
        ours = last.x * schedule.alpha(sigmas[-1])

        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = schedule.alphas_cumprod, schedule.alphas_cumprod[0]
        scheduler.set_timesteps(20)
        theirs, z = copy.deepcopy(pipe.unet).double(), noise
        for t in scheduler.timesteps:
            output = guided(lambda z, t, context: theirs(z, t, context).sample, z, t.expand(1))
            z = scheduler.step(output, t, z).prev_sample
    assert z.dtype == ours.dtype == torch.float64
    error = relative(ours, z)
    print(f"{path.name}: trajectory in float64 {error:.1e}")
    assert error <= 1e-9


def test_our_export_draws_the_same_there(small: tuple[Any, Path], tmp_path: Path) -> None:
    """diffusers -> ours -> diffusers: bit for bit the same weights, settings that draw the same picture.

    But for the scheduler, which is the one that draws as we do, whatever theirs was.
    """
    pipe, path = small
    checkpoint = open_checkpoint(path)
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    assert export.write(tmp_path / "again", checkpoint.config, states, "diffusers") == []
    again = sd.peers().StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    again.scheduler = pipe.scheduler
    options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt", "negative_prompt": "!"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pictures = [p("a DOG!! &amp; <|endoftext|> ", latents=noise, **options).images for p in (pipe, again)]
    assert torch.equal(*pictures)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_at_full_size(version: int, tmp_path: Path) -> None:
    """Stable Diffusion's own shapes, latents of 16 x 16. The peer is gone before ours is loaded: each takes 4 GB."""
    pipe = sd.pipeline(version, full=True)
    path = sd.save(pipe, tmp_path / "peer")
    there, latent = outputs_there(pipe, 16, torch.float32), drawn_there(pipe, 16)
    del pipe
    gc.collect()
    errors = errors_here(path, 16, torch.float32, there)
    trajectory = relative(drawn_here(ldm.load(path, device="cpu"), 16), latent)
    print(f"v{version}: " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()) + f", trajectory {trajectory:.1e}")
    shutil.rmtree(path)
    assert max(errors.values()) <= 1e-5, errors
    assert trajectory <= 1e-4
