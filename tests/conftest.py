"""A model small enough to draw with in milliseconds. Its weights are random; its pictures are not blank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads than that only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = ModelConfig(
    autoencoder=AutoencoderConfig(
        channels=32, multipliers=(1, 1, 1), blocks=1, middle_attention=False, latent_channels=4, scale=(0.5,)
    ),
    text=TextConfig(
        context_length=16, token_ids=(0, *range(256, 3000), 49406, 49407), width=32, heads=2, layers=2, embed_dim=16
    ),
    unet=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, context_width=32),
    schedule=ScheduleConfig(steps=100, beta_start=0.0085, beta_end=0.12),
    parameterization="v",
    image_size=32,
)


def tiny_parts(config: ModelConfig = TINY, seed: int = 0) -> Mapping[str, object]:
    """Random networks of `config`, the zero weights that a new U-Net begins with replaced by random ones."""
    import torch

    from ldm.autoencoder.kl import AutoencoderKL
    from ldm.conditioning.clip import TextTower
    from ldm.unet import UNet

    assert config.autoencoder and config.text and config.unet
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"autoencoder": AutoencoderKL(config.autoencoder), "text": TextTower(config.text)}
        parts["unet"] = UNet(config.unet)
        for parameter in (p for part in parts.values() for p in part.parameters()):
            if not bool(parameter.detach().any()):
                torch.nn.init.normal_(parameter, std=0.1)
    return parts


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint directory of a random model, 32 px, f = 4. Not to be changed: copy it first."""
    from ldm.checkpoints import native

    path = tmp_path_factory.mktemp("models") / "tiny"
    native.save(path, TINY, tiny_parts())  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path):
    """That model on the CPU, as ldm.load gives it."""
    import ldm

    return ldm.load(tiny_checkpoint, device="cpu")
