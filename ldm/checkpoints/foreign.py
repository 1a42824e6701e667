"""Which foreign formats can hold a model of ours, and what keeps it from the others; export.py writes them."""

from __future__ import annotations

from collections.abc import Collection

from ldm.autoencoder.blocks import usual_groups
from ldm.checkpoints import diffusers_configs as configs
from ldm.checkpoints import edm, native, networks, sd3, sdxl
from ldm.checkpoints.architectures import DEPTH, MASK, extra_channels
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig, MMDiTConfig, ModelConfig, UNetConfig
from ldm.unet.unet import level_depths

FORMATS = ("original", "diffusers")
NAMES = {"original": "an original file", "diffusers": "a diffusers directory"}
PIPELINES = {
    0: "StableDiffusionPipeline",
    MASK: "StableDiffusionInpaintPipeline",
    DEPTH: "StableDiffusionDepth2ImgPipeline",
}


def where_to(config: ModelConfig) -> str:
    """Which foreign formats can hold a model of `config`, and what keeps it from the others; for a run's plan."""
    parts = native.part_names(config)
    if not complete(parts):
        return "our own format alone: others hold a whole model or an autoencoder"
    why = {to: ", ".join(reasons(config, parts, to)) for to in FORMATS}
    able = " and ".join(NAMES[to] for to in FORMATS if not why[to])
    if len(set(why.values())) == 1:
        return able or f"our own format alone: others have no place for {why[FORMATS[0]]}"
    kept = "; ".join(f"{NAMES[to]} has no place for {why[to]}" for to in FORMATS if why[to])
    return f"{able or 'our own format alone'}; {kept}"


def reasons(config: ModelConfig, parts: Collection[str], to: str) -> list[str]:
    """What of a model with these parts, all or an autoencoder alone, format `to` has no words for; names settings."""
    if isinstance(config.unet, MMDiTConfig) and "unet" in parts:
        return sd3.unsayable(config, to)
    found = ["T5"] if "t5" in parts else []
    if config.autoencoder is not None:
        plain = AutoencoderConfig()
        for name in ("kind", "patch", *(("attention_levels",) if to == "diffusers" else ())):
            if getattr(config.autoencoder, name) != getattr(plain, name):
                found.append(f"autoencoder.{name}={getattr(config.autoencoder, name)}")
        if not config.autoencoder.latent_convs and ("unet" in parts or to == "original"):
            found.append("autoencoder.latent_convs=False")
        elif (
            not config.autoencoder.latent_convs
            and max(map(len, (config.autoencoder.shift, config.autoencoder.scale))) > 1
        ):
            found.append("a shift or scale for each channel, without the convolutions that could take them in")
        groups = groups_of(config.autoencoder)
        if len(groups) > 1 or (to == "original" and groups != {32}):
            found.append(
                f"an autoencoder whose norms have {' and '.join(map(str, sorted(groups)))} groups "
                f"(autoencoder.norm_groups={config.autoencoder.norm_groups})"
            )
    for name, text in config.towers.items():
        if text.arch and name in parts and networks.skeleton(name, config, "the model").causal_mask is None:
            found.append(f"{name}.arch={text.arch}, whose tokens see those behind them")
    if isinstance(config.unet, UNetConfig) and "unet" in parts:
        plain_unet = UNetConfig()
        if sdxl.is_xl(config):
            found += sdxl.unsayable(config)
        elif len(config.towers) > 1:
            found.append("two text towers of a U-Net that is told no vector")
        for name in ("time_embedding", "time_injection", "classes"):
            if getattr(config.unet, name) != getattr(plain_unet, name):
                found.append(f"unet.{name}={getattr(config.unet, name)}")
        if not config.unet.context_width or not config.unet.attention_levels:
            found.append("a U-Net without a context")
        elif networks.norm_groups(networks.skeleton("unet", config, "the model")) != {32}:
            found.append(f"unet.channels={config.unet.channels}, whose norms have other than 32 groups")
        if to == "diffusers" and config.unet.multipliers[0] != 1:  # there the first level is as wide as what is before
            found.append(f"unet.multipliers={list(config.unet.multipliers)}, which do not begin with 1")
        if config.schedule is not None and config.schedule.kind == "edm":
            found += edm.unsayable(config, to)
        elif config.parameterization not in configs.PREDICTIONS.values():
            found.append(f"parameterization={config.parameterization}")
        if config.schedule is not None and config.schedule.kind not in ("edm", *configs.BETAS.values()):
            found.append(f"schedule.kind={config.schedule.kind}")
        if config.learned_variance:
            found.append("learned_variance=true")
        last = len(config.unet.multipliers) - 1
        if to == "diffusers" and level_depths(config.unet).get(last) not in (None, config.unet.transformer_depth):
            found.append(f"unet.depths={list(config.unet.depths)}, whose last is not transformer_depth")
        if to == "diffusers" and extra_channels(config) not in PIPELINES:
            found.append(f"unet.in_channels={config.unet.in_channels}")
    return found


def refuse(config: ModelConfig, parts: Collection[str], to: str) -> None:
    """Raise UserError, naming the setting, for a model that format `to` has no words for."""
    if not complete(parts):
        raise UserError(f"the {to} layout holds a whole model or an autoencoder, not {' and '.join(parts)}")
    if found := reasons(config, parts, to):
        raise UserError(f"the {to} layout has no place for {', '.join(found)}; keep the native format")


def complete(parts: Collection[str]) -> bool:
    return set(parts) == {"autoencoder"} or {"autoencoder", "text", "unet"} <= set(parts)


def groups_of(config: AutoencoderConfig) -> set[int]:
    """The different numbers of groups that its norms have."""
    return {config.norm_groups or usual_groups(config.channels * multiplier) for multiplier in config.multipliers}
