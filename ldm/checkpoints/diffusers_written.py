"""Our config dataclasses -> the JSON files of a diffusers directory; diffusers_configs.py reads them."""

from __future__ import annotations

from typing import Any

from ldm.checkpoints.diffusers_configs import AUTOENCODER_FIXED, BETAS, PREDICTIONS, UNET_FIXED, block_types
from ldm.model_config import AutoencoderConfig, ScheduleConfig, TextConfig, UNetConfig

SCHEDULER, LCM_SCHEDULER = "DPMSolverMultistepScheduler", "LCMScheduler"


def write_unet(config: UNetConfig, latent_side: int, sizes: int = 0) -> dict[str, Any]:
    """unet/config.json of a U-Net that diffusers can hold (`foreign.reasons`); `sizes` is the encoder's."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    down, up = block_types(len(widths), config.attention_levels)
    return {
        "_class_name": "UNet2DConditionModel",
        **UNET_FIXED,
        "sample_size": latent_side,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "down_block_types": list(down),
        "up_block_types": list(up),
        "layers_per_block": config.blocks,
        "transformer_layers_per_block": _depths(config),
        "addition_embed_type": "text_time" if config.vector_width else None,
        "addition_time_embed_dim": sizes or None,
        "projection_class_embeddings_input_dim": config.vector_width or None,
        "time_cond_proj_dim": config.guidance_width or None,
        "attention_head_dim": config.heads or [width // config.head_width for width in widths],
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
        "dropout": config.dropout,
    }


def write_autoencoder(config: AutoencoderConfig, groups: int) -> dict[str, Any]:
    """vae/config.json; shift and scale are one number each."""
    levels = len(config.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        **AUTOENCODER_FIXED,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "use_quant_conv": config.latent_convs,
        "use_post_quant_conv": config.latent_convs,
        "norm_num_groups": groups,
        "mid_block_add_attention": config.middle_attention,
        "sample_size": 32 * config.factor,
        "scaling_factor": config.scale[0],
        "shift_factor": config.shift[0] or None,
    }


def write_text(config: TextConfig) -> dict[str, Any]:
    """text_encoder/config.json; of a tower with a projection, that of Stable Diffusion XL's second."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.embed_dim else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocabulary,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.embed_dim or config.width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if config.padding == "eot" else 0,
    }


def write_scheduler(schedule: ScheduleConfig, parameterization: str, lcm: bool = False) -> dict[str, Any]:
    """scheduler/scheduler_config.json of what `--sampler ddim --spacing trailing` draws, which is right for every law;
    or of `--sampler lcm`.

    DPM-Solver++ of order 1 is DDIM with eta 0. Their DDIMScheduler steps from t to t - T // N whatever its grid is, so
    with N = 30 of 1000 levels it would come by others than it evaluates.
    """
    drawn: dict[str, Any] = {
        "_class_name": SCHEDULER,
        "algorithm_type": "dpmsolver++",
        "solver_order": 1,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # of leading levels; the pipeline complains of any other number
        "final_sigmas_type": "zero",
    }
    if lcm:
        drawn = {"_class_name": LCM_SCHEDULER, "original_inference_steps": 50, "set_alpha_to_one": True}
    return drawn | {
        "num_train_timesteps": schedule.steps,
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[schedule.kind],
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[parameterization],
        "thresholding": False,
        "clip_sample": False,  # of other schedulers, which may be made of this file and do so unless told
        "trained_betas": None,
    }


def _depths(config: UNetConfig) -> int | list[int]:
    """As diffusers has it: the last number is the middle's too."""
    if not config.depths:
        return config.transformer_depth
    of_level = dict(zip(config.attention_levels, config.depths, strict=True))
    last = len(config.multipliers) - 1
    return [config.transformer_depth if level == last else of_level.get(level, 1) for level in range(last + 1)]
