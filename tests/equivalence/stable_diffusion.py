"""Stable Diffusion built of diffusers' and transformers' own classes, random weights, at any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning.torchvision_ops import declare_missing_operators

SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
}
FULL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SCHEDULER: dict[str, Any] = {  # as the original DDIM runs, see FACTS of the released configuration
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def peers() -> Any:
    """diffusers, or the test is skipped."""
    declare_missing_operators()  # its models import transformers, which imports torchvision
    pytest.importorskip("transformers")
    return pytest.importorskip("diffusers")


def unet(version: int, full: bool, in_channels: int = 4) -> Any:
    """Version 1: convolutions around the attention, as many heads everywhere; 2: linear layers, heads as wide."""
    torch.manual_seed(0)
    size = {"sample_size": 16} if full else SMALL_UNET
    if version == 1:
        heads, width = (8, 768) if full else (4, 64)
    else:
        heads, width = ([5, 10, 20, 20], 1024) if full else ([2, 4], 64)
    return (
        peers()
        .UNet2DConditionModel(
            in_channels=in_channels,
            attention_head_dim=heads,
            cross_attention_dim=width,
            use_linear_projection=version == 2,
            **size,
        )
        .eval()
    )


def vae(full: bool) -> Any:
    torch.manual_seed(1)
    return peers().AutoencoderKL(**(FULL_VAE if full else SMALL_VAE)).eval()


def text_encoder(version: int, full: bool) -> Any:
    """Version 2's has lost its last block, which Stable Diffusion does not use."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    width, layers = {(1, True): (768, 12), (2, True): (1024, 23)}.get((version, full), (64, 2))
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        hidden_act="quick_gelu" if version == 1 else "gelu",
        initializer_factor=1.0,
    )
    model = CLIPTextModel(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms begin as 0 and 1, where a mix-up hides
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model


def tokenizer(version: int) -> Any:
    """Hugging Face's, over open_clip's own vocabulary file. Version 2 pads with "!", which is token 0."""
    from transformers import CLIPTokenizer

    from ldm.checkpoints.diffusers_tokenizer import merges, vocabulary

    pairs = [tuple(pair.split(" ")) for pair in merges()]
    pad = {} if version == 1 else {"pad_token": "!"}
    return CLIPTokenizer(vocab=dict(vocabulary()), merges=pairs, model_max_length=77, **pad)


def scheduler(version: int, prediction: str = "") -> Any:
    prediction = prediction or ("epsilon" if version == 1 else "v_prediction")
    return peers().DDIMScheduler(prediction_type=prediction, **SCHEDULER)


def pipeline(version: int, full: bool = False) -> Any:
    """The whole of it."""
    return peers().StableDiffusionPipeline(
        unet=unet(version, full),
        vae=vae(full),
        text_encoder=text_encoder(version, full),
        tokenizer=tokenizer(version),
        scheduler=scheduler(version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipe: Any, path: Path, **options: Any) -> Path:
    pipe.save_pretrained(path, **options)
    return path


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||"""
    return float((a.double() - b.double()).norm() / b.double().norm())
