"""What diffusers saves, loaded here, computes the same; what is exported here, diffusers opens and draws the same.

Weights are random. In float64 (the time embedding in float32, as both have it) what remains is the map of names and
settings; in float32 also the rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm.checkpoints import export, networks
from ldm.checkpoints.opening import open_checkpoint
from ldm.jobs import Settings
from ldm.sampling import NoiseStream, finish

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


def check_networks(pipe: Any, path: Path, dtype: torch.dtype, most: float) -> dict[str, float]:
    """The largest relative error of each network, on inputs of the peer's own kind."""
    unet, vae, text = (part.to(dtype) for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    checkpoint = open_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    found = {}
    with torch.no_grad():
        ours = networks.load_text(checkpoint, dtype=dtype)
        tokens, _ = ours.tokenize(PROMPTS)
        theirs = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(tokens, theirs)
        context = text(tokens).last_hidden_state
        found["text tower"] = relative(ours(tokens), context)

        x = torch.randn(3, unet.config.in_channels, 8, 8, generator=generator).to(dtype)
        t = torch.tensor([1.0, 500.0, 981.0])
        network = networks.load_unet(checkpoint, dtype=dtype)
        found["U-Net"] = relative(network(x, t, context), unet(x, t, context).sample)

        autoencoder = networks.load_autoencoder(checkpoint, dtype=dtype).autoencoder
        assert autoencoder is not None
        image = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1).to(dtype)
        moments = autoencoder.to_moments(autoencoder.encoder(image))
        found["encode"] = relative(moments, vae.quant_conv(vae.encoder(image)))
        z = moments[:, :4]
        found["decode"] = relative(autoencoder.decode(z), vae.decode(z).sample)
    assert max(found.values()) <= most, found
    return found


def trajectory(model: ldm.LatentDiffusion, side: int, seed: int, prompt: str, negative: str) -> torch.Tensor:
    """The latent (1, 4, side, side) at the end of 20 steps of guided DDIM on the original grid."""
    pixels = side * model.codec.factor
    settings = Settings(cfg=7.5, steps=20, sampler="ddim", spacing="leading", width=pixels, height=pixels)
    *_, last = model.sample(prompt, negative=negative, seed=seed, settings=settings)
    return finish(last.x, model.schedule, torch.tensor([last.sigma_next]))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_the_networks(small: tuple[Any, Path], dtype: torch.dtype, most: float) -> None:
    check_networks(*small, dtype, most)
    small[0].to(torch.float32)


def check_trajectory(pipe: Any, model: ldm.LatentDiffusion, side: int, most: float) -> float:
    """The relative error of the latent that comes out, from the same noise and words."""
    words, seed = ("a red heart on a table", "blurry"), 4
    noise = NoiseStream([seed], (4, side, side)).initial().float()
    options = {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "latent", "negative_prompt": words[1]}
    pixels = side * model.codec.factor
    theirs = pipe(words[0], latents=noise, height=pixels, width=pixels, **options).images
    assert bool(theirs.std() > 0.1)
    found = relative(trajectory(model, side, seed, *words), theirs)
    assert found <= most, found
    return found


@pytest.fixture(scope="module")
def loaded(small: tuple[Any, Path]) -> ldm.LatentDiffusion:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # everything is in the files: nothing to assume, nothing to say
        return ldm.load(small[1], device="cpu")


def test_a_guided_trajectory(small: tuple[Any, Path], loaded: ldm.LatentDiffusion) -> None:
    check_trajectory(small[0], loaded, 8, 1e-4)


def test_our_export_draws_the_same_there(small: tuple[Any, Path], tmp_path: Path) -> None:
    """diffusers -> ours -> diffusers: bit for bit the same weights, settings that draw the same picture."""
    pipe, path = small
    checkpoint = open_checkpoint(path)
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    assert export.write(tmp_path / "again", checkpoint.config, states, "diffusers") == []
    again = sd.peers().StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt", "negative_prompt": "!"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pictures = [p("a DOG!! &amp; <|endoftext|> ", latents=noise, **options).images for p in (pipe, again)]
    assert torch.equal(*pictures)
