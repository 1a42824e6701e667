"""Stable Diffusion XL, base and refiner, built of diffusers' and transformers' own classes, random weights."""

from __future__ import annotations

from typing import Any

import torch

from . import stable_diffusion as sd

SIZES = 16  # numbers that say each of the sizes


def tower(width: int, layers: int, projection: int, seed: int) -> Any:
    """CLIP's text tower, with a projection of that width or (0) none."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="gelu" if projection else "quick_gelu",
        projection_dim=projection or width,
        initializer_factor=1.0,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms begin as 0 and 1, where a mix-up hides
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return model


def unet(refiner: bool) -> Any:
    """Levels without attention at both ends of the refiner's, of two depths in the base."""
    torch.manual_seed(0)
    attends = (False, True, False) if refiner else (False, True, True)
    kinds = ["CrossAttn" if some else "" for some in attends]
    return (
        sd.peers()
        .UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 128),
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            layers_per_block=1,
            transformer_layers_per_block=2 if refiner else (1, 2, 3),
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=128 if refiner else 192,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZES,
            projection_class_embeddings_input_dim=96 + (5 if refiner else 6) * SIZES,
        )
        .eval()
    )


def vae() -> Any:
    torch.manual_seed(1)
    return sd.peers().AutoencoderKL(**sd.SMALL_VAE, scaling_factor=0.13025).eval()


def base() -> Any:
    """The whole of it, as StableDiffusionXLPipeline."""
    return sd.peers().StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=tower(64, 3, 0, 2),
        text_encoder_2=tower(128, 4, 96, 3),
        tokenizer=sd.tokenizer(1),
        tokenizer_2=sd.tokenizer(2),
        unet=unet(False),
        scheduler=sd.scheduler(1),
        add_watermarker=False,
    )


def refiner() -> Any:
    """The same of the refiner, which begins with a picture."""
    return sd.peers().StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=tower(128, 4, 96, 3),
        tokenizer=None,
        tokenizer_2=sd.tokenizer(2),
        unet=unet(True),
        scheduler=sd.scheduler(1),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
