"""What diffusers draws with an exported model, left as it is, are the pictures that are drawn here by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints.small_models import random_states  # tests/ is the root of the tests' packages
from torch import Tensor

import ldm
from ldm.checkpoints import export, native
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from ldm.jobs import Settings
from ldm.sampling import NoiseStream

from . import stable_diffusion as sd

PROMPTS, SEED = ["a red heart", "two cats and a dog"], 4
DDIM = Settings(sampler="ddim", spacing="trailing")  # what the directory's scheduler is
NARROW = ModelConfig(
    AutoencoderConfig(
        channels=16,
        multipliers=(1, 2),
        blocks=1,
        norm_groups=4,
        shift=(0.1, -0.2, 0.0, 0.3),
        scale=(0.5, 0.7, 0.6, 0.4),
    ),
    TextConfig(token_ids=(0, *range(300, 900), 49406, 49407), width=32, heads=1, layers=2, embed_dim=16),
    UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, context_width=32),
    ScheduleConfig(),
    image_size=16,
)


def drawn_there(path: Path, noise: Tensor, **options: Any) -> Tensor:
    """(B, 3, H, W) in [-1, 1] from the pipeline that lies at `path`, untouched."""
    pipe = sd.peers().StableDiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=noise, output_type="pt", **options).images * 2 - 1


@pytest.mark.parametrize(
    ("schedule", "parameterization", "steps", "most"),
    [
        pytest.param(ScheduleConfig(), "eps", 30, 1e-4, id="eps"),
        pytest.param(ScheduleConfig(), "v", 30, 1e-4, id="v"),
        pytest.param(ScheduleConfig(), "v", 7, 1e-4, id="v in 7 steps"),
        pytest.param(ScheduleConfig(), "x0", 30, 3e-4, id="x0"),
        pytest.param(ScheduleConfig("linear", 400, 0.0003, 0.05), "v", 30, 1e-4, id="400 linear levels"),
        pytest.param(ScheduleConfig("cosine"), "eps", 30, 1e-4, id="cosine"),
        # They begin at alpha_bar = 2^-24, we at 1e-12.
        pytest.param(ScheduleConfig(zero_terminal_snr=True), "v", 30, 2e-3, id="zero terminal SNR"),
    ],
)
def test_the_pictures(schedule: ScheduleConfig, parameterization: str, steps: int, most: float, tmp_path: Path) -> None:
    """30 steps do not divide the 1000 levels. Measured: 4e-6 to 1e-5, x0 9e-5, zero SNR 6e-4."""
    config = replace(NARROW, schedule=schedule, parameterization=parameterization)
    states = random_states(config)
    native.save(tmp_path / "ours", config, states)
    export.write(tmp_path / "theirs", config, states, "diffusers")
    noise = NoiseStream([SEED, SEED + 1], (4, 8, 8)).initial()
    ours = ldm.load(tmp_path / "ours", device="cpu").txt2img(PROMPTS, seed=SEED, steps=steps, settings=DDIM)
    theirs = drawn_there(tmp_path / "theirs", noise, num_inference_steps=steps)
    error = float((ours - theirs).abs().max())
    print(f"{schedule.kind} {parameterization} {steps}: {error:.1e} of {float(ours.std()):.2f}")
    assert ours.std() > 0.1 and error <= most
