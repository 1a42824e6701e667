"""The recipes for other people's pictures make models that diffusers opens; the tiny one is trained and proves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.toys import CPU, ICONS, run  # tests/ is the root of the tests' packages

import ldm
from ldm.checkpoints import export, foreign
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderTraining, ClipTraining, DiffusionTraining, ModelConfig, load
from ldm.jobs import Settings
from ldm.sampling import NoiseStream
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage

from . import stable_diffusion as sd

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("autoencoder", "text", "unet", "words"),
    [
        ("sd", "sd", "sd256", "an original file and a diffusers directory"),
        ("sd64", "icons", "sd64", "a diffusers directory; "),
        ("tiny", "tiny", "tiny", "a diffusers directory; "),
        ("icons", "icons", "icons", "our own format alone: "),  # the shipped model's
    ],
)
def test_where_the_recipes_models_can_go(autoencoder: str, text: str, unet: str, words: str) -> None:
    first = load(AutoencoderTraining, CONFIGS / "autoencoder" / f"{autoencoder}.yaml")
    tower = load(ClipTraining, CONFIGS / "clip" / f"{text}.yaml")
    second = load(DiffusionTraining, CONFIGS / "diffusion" / f"{unet}.yaml")
    assert second.model.context_width == tower.model.width
    assert first.data.size == second.data.size and tower.data.size == tower.image_tower.size
    model = ModelConfig(first.model, tower.model, second.model, second.schedule, second.parameterization)
    assert foreign.where_to(model).startswith(words)
    assert foreign.where_to(ModelConfig(first.model)).startswith(words)


def trained(name: str, kind: Any, stage: Any, folder: Path, *words: str) -> Path:
    """What the tiny recipe NAME leaves after two steps."""
    recipe = CONFIGS / name / "tiny.yaml"
    shards = [f"data.shards={ICONS}/train-*.tar", f"output={folder}"]
    config = load(kind, recipe, [*shards, "data.size=16", "loop.steps=2", "loop.threads=1", *words])
    made = stage(config, 0, 1, CPU)
    assert any(line.startswith("export      a diffusers directory") for line in made.describe())
    run(made, config.loop, folder, config)
    return folder


def test_the_tiny_recipes_model_draws_the_same_in_diffusers(tmp_path: Path) -> None:
    plain = ("loss.perceptual=0", "loss.adversarial=0", "scale_samples=16")
    autoencoder = trained("autoencoder", AutoencoderTraining, AutoencoderStage, tmp_path / "ae", *plain)
    words = (f"autoencoder={autoencoder}", "text=icons", "model.context_width=192", "sample.prompts=[]")
    trained("diffusion", DiffusionTraining, diffusion_stage, tmp_path / "ldm", *words)

    checkpoint = open_checkpoint(tmp_path / "ldm")
    states = {part: checkpoint.state(part) for part in checkpoint.parts}
    export.write(tmp_path / "theirs", checkpoint.config, states, "diffusers")
    pipe = sd.peers().StableDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    pipe.set_progress_bar_config(disable=True)
    ours = ldm.load(tmp_path / "ldm", device="cpu").txt2img(
        "a red heart", seed=3, settings=Settings(steps=30, sampler="ddim", spacing="trailing")
    )
    noise = NoiseStream([3], (4, 4, 4)).initial()
    theirs = pipe("a red heart", latents=noise, num_inference_steps=30, output_type="pt").images * 2 - 1
    assert pipe.text_encoder.config.max_position_embeddings == 32 and ours.shape == theirs.shape == (1, 3, 16, 16)
    assert float(ours.std()) > 0.01 and float((ours - theirs).abs().max()) <= 1e-4

    vae = sd.peers().AutoencoderKL.from_pretrained(tmp_path / "theirs" / "vae")
    assert torch.isfinite(vae.decode(noise / vae.config.scaling_factor).sample).all()
