"""The original layout against diffusers' own reader of it, a witness that names mean what we take them for.

diffusers takes the settings from a directory beside the file (its own are on the network), the weights from the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.small_models import SMALL, random_states, same  # tests/ is the root of the tests' packages
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoints import export
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import ModelConfig
from ldm.jobs import Settings
from ldm.model import CheckpointNotice
from ldm.sampling import NoiseStream

from . import stable_diffusion as sd

V1 = replace(
    SMALL,
    text=replace(SMALL.text, layers=2, embed_dim=0, layer="last", padding="eot", quick_gelu=True, cleaning="plain"),
    unet=replace(SMALL.unet, heads=8, head_width=0, linear_projection=False),
    parameterization="eps",
)
MODELS = [pytest.param(V1, id="v1"), pytest.param(SMALL, id="v2")]
PARTS = ("unet", "vae", "text_encoder")


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name in PARTS for key, value in getattr(pipe, name).state_dict().items()}


@pytest.mark.parametrize("config", MODELS)
def test_diffusers_reads_our_original_file(config: ModelConfig, tmp_path: Path):
    """Through its directory and through the single file it holds the same weights, to the bit."""
    pipeline = sd.peers().StableDiffusionPipeline
    states = random_states(config)
    for to, name in (("original", "model.safetensors"), ("diffusers", "model")):
        export.write(tmp_path / name, config, states, to)
    options = {"config": str(tmp_path / "model"), "local_files_only": True, "torch_dtype": torch.float32}
    single = pipeline.from_single_file(str(tmp_path / "model.safetensors"), **options)
    folder = pipeline.from_pretrained(tmp_path / "model")
    assert same(weights(single), weights(folder))


@pytest.mark.parametrize("config", MODELS)
def test_a_bare_original_file_draws_what_diffusers_draws(config: ModelConfig, tmp_path: Path):
    """Without a word in its metadata: what its tensors do not say, the rules say (v2's prediction is v)."""
    states = random_states(config)
    export.write(tmp_path / "model", config, states, "diffusers")
    export.write(tmp_path / "m.safetensors", config, states, "original")
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "bare.safetensors")

    pipe = sd.peers().StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(CheckpointNotice, match=f"parameterization={config.parameterization}"):
        model = ldm.load(tmp_path / "bare.safetensors", device="cpu")
    assert replace(model.config, image_size=16) == config
    settings = Settings(cfg=5.0, steps=5, sampler="ddim", spacing="trailing", width=16, height=16)
    ours = model.txt2img("a red heart", negative="blurry", seed=7, settings=settings)
    noise = NoiseStream([7], (4, 8, 8)).initial().float()
    options = {"guidance_scale": 5.0, "num_inference_steps": 5, "width": 16, "height": 16, "output_type": "pt"}
    theirs = pipe("a red heart", negative_prompt="blurry", latents=noise, **options).images
    assert theirs.std() > 0.05
    assert sd.relative((ours / 2 + 0.5).clamp(0, 1), theirs) < 1e-4


def test_an_inpainting_model_is_read_and_written(tmp_path: Path):
    peers = sd.peers()
    unet = sd.unet(1, full=False, in_channels=9)
    pipe = peers.StableDiffusionInpaintPipeline(
        unet=unet,
        vae=sd.vae(False),
        text_encoder=sd.text_encoder(1, False),
        tokenizer=sd.tokenizer(1),
        scheduler=sd.scheduler(1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    checkpoint = open_checkpoint(sd.save(pipe, tmp_path / "peer"))
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    assert export.write(tmp_path / "again", checkpoint.config, states, "diffusers") == []
    again = peers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again).__name__ == "StableDiffusionInpaintPipeline"
    assert same(weights(again), weights(pipe))
