"""The library: what gives a LatentDiffusion, a Model that draws.

torch is imported when a model is loaded, not when this module is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import load_model
from ldm.model import CheckpointNotice
from ldm.model import assemble as assemble_model
from ldm.notices import PictureNotice, PromptNotice

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec
    from ldm.conditioning.clip import TextTower
    from ldm.conditioning.t5 import T5Tower
    from ldm.config import ModelConfig
    from ldm.networks import AnyNetwork

__all__ = ["CheckpointNotice", "LatentDiffusion", "PictureNotice", "PromptNotice", "assemble", "load"]


def load(
    model: str | Path = "icons",
    device: str = "auto",
    precision: str = "auto",
    *,
    vae: str | Path | None = None,
    weights: str = "auto",
    settings: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    backend: str = "auto",
    low_memory: bool = False,
) -> LatentDiffusion:
    """The model of a shipped name, a checkpoint directory or file, or a Hugging Face id, ready to draw.

    Native checkpoints, Stable Diffusion 1, 2, XL and 3 in the original single file (.safetensors, .ckpt) and diffusers
    directories are read; `hf:owner/name` is fetched first. What such files do not say of themselves is assumed by the
    rules of checkpoints/architectures.py, and a CheckpointNotice warns of it.

    Args:
        device: auto, cpu, cuda, mps.
        precision: auto, fp32, fp16, bf16 (auto: fp16 on a GPU, else fp32).
        vae: a checkpoint whose autoencoder takes the place of the model's own.
        weights: of a file with two sets of U-Net weights: ema (the average), raw, or auto (the average, and says so).
        settings: what goes before all that files and rules say: {"parameterization": "v", "text.padding": "eot"};
            {"t5": None} leaves out T5.
        attention: of the U-Net: sdpa, torch's own, or xformers, where that is installed and the device is CUDA's.
        backend: what runs the networks (ldm/backends): auto, the fastest that needs no preparation; torch, layer by
            layer as it trains; compile, the U-Net by torch.compile; graph, its step as a CUDA graph; openvino, its step
            as OpenVINO compiles it for a CPU. What is drawn is the same to rounding.
        low_memory: run the networks on one picture and one branch of guidance at a time, and keep them on the CPU while
            they do not work. What is drawn is the same to rounding (docs/memory.md).

    Raises:
        UserError: what is not there, damaged, of another architecture, or not a text-to-picture model.
    """
    made = LatentDiffusion.of(
        load_model(
            model,
            device,
            precision,
            vae=vae,
            weights=weights,
            settings=settings,
            attention=attention,
            backend=backend,
            low_memory=low_memory,
        )
    )
    for notice in made.notices:
        warnings.warn(notice, CheckpointNotice, stacklevel=2)
    return made


def assemble(
    config: ModelConfig,
    codec: Codec,
    towers: Mapping[str, TextTower | T5Tower],
    unet: AnyNetwork,
    name: str = "",
    path: Path | None = None,
) -> LatentDiffusion:
    """`model.assemble`, able to draw."""
    return LatentDiffusion.of(assemble_model(config, codec, towers, unet, name, path))
