"""Stable Diffusion 3 in foreign files: the single file, with text towers or without, and what its tensors do not say.

    model.diffusion_model.*               the transformer (mmdit.py has its names)
    first_stage_model.*                   the autoencoder, of 16 channels, without 1x1 convolutions
    text_encoders.clip_l.transformer.*    CLIP ViT-L/14 in Hugging Face's names; its projection is missing
    text_encoders.clip_g.transformer.*    OpenCLIP ViT-bigG/14 in the same
    text_encoders.t5xxl.transformer.*     the encoder of T5 XXL (t5.py), or zeros stand in its place

A file without towers lies beside theirs, as published: clip_l.safetensors, clip_g.safetensors and
t5xxl_fp16.safetensors, there or in the folder text_encoders. What no tensor says is the same for all: rectified flow
with shift 3, 1024 pixels, the latent's shift and scale, and how the towers are read (Esser et al. 2024, appendix B.3).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints import mmdit, original, t5
from ldm.checkpoints.changed import Changed, Made
from ldm.checkpoints.common_names import autoencoder_of_shapes, clip_names
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.scaled import unscaled
from ldm.checkpoints.state import Names, Source, exported, within
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.model_config import EncoderConfig, MMDiTConfig, ModelConfig, ScheduleConfig, TextConfig
from ldm.settings import to_dict

UNET, AUTOENCODER = original.UNET, original.AUTOENCODER
TOWERS = {"text": "clip_l", "text_2": "clip_g"}
PROJECTION = "text_projection.weight"
FLOW = ScheduleConfig("flow", shift=3.0)
SHIFT, SCALE = 0.0609, 1.5305  # of the latent
LENGTH, SIDE = 77, 1024  # tokens of T5; pixels
CLIP = TextConfig(padding="eot", cleaning="plain", quick_gelu=True, layer="penultimate", final_norm=False)
BIGG = replace(CLIP, padding="zero", quick_gelu=False)


def is_single_file(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a file of a Stable Diffusion 3 model."""
    return tensors is not None and f"{UNET}joint_blocks.0.x_block.attn.qkv.weight" in tensors


def open_single_file(path: Path, stored: Tensors, weights: str = "auto", decided: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in `path`, whose tensors these are; without T5 where that is `decided`. Raises UserError for
    networks that are not SD 3's."""
    tensors = unscaled(stored)
    shapes = {name: tensors.form(name)[1] for name in tensors}
    config = original.own_config(tensors.metadata, path)
    settings: dict[str, object] = {"unet": mmdit.config_of_shapes(within(shapes, UNET))}
    parts = {"unet": _part(tensors, UNET, partial(mmdit.original_names, prefix=UNET), path)}
    used = [*parts["unet"].scope]
    if f"{AUTOENCODER}decoder.conv_in.weight" in shapes:
        autoencoder = autoencoder_of_shapes(within(shapes, AUTOENCODER), path, *original.FIRST_STAGE_PLACES)
        settings["autoencoder"] = replace(autoencoder, shift=(SHIFT,), scale=(SCALE,))
        parts["autoencoder"] = _part(
            tensors, AUTOENCODER, partial(original.autoencoder_names, config=autoencoder, prefix=AUTOENCODER), path
        )
        used += parts["autoencoder"].scope
    remarks = []
    for name, theirs in TOWERS.items():
        prefix, source, file = f"text_encoders.{theirs}.transformer.", tensors, path
        if f"{prefix}text_model.final_layer_norm.weight" not in shapes:
            beside = _beside(path, theirs)
            if beside is None:
                continue
            prefix, source, file = "", unscaled(read_tensors(beside)), beside
            remarks.append(f"{path} has no text tower {theirs}; that of {beside} is used")
        settings[name], parts[name] = tower(source, prefix, file, CLIP if name == "text" else BIGG)
        used += [n for n in shapes if n.startswith(f"text_encoders.{theirs}.")]
    text, other = (getattr(settings.get(name), "width", 0) for name in ("text", "text_2"))
    if text > other > 0:
        raise UserError(
            f"of {path} clip_l is {text} wide and clip_g {other}, so each has the other's name; exchange the names"
        )
    used += [n for n in shapes if n.startswith("text_encoders.t5xxl.")]
    third = t5.within(path, tensors) if "text" in parts and "t5" not in decided else None
    if third is not None:
        settings["t5"], parts["t5"] = third[0], Part(*third[1])
        if parts["t5"].file != str(path):
            remarks.append(f"{path} has no T5; that of {parts['t5'].file} is used")
    made = config or completed(ModelConfig(**settings))  # type: ignore[arg-type]
    made = replace(made, t5=settings.get("t5"))  # type: ignore[arg-type]
    foreign = tuple(name for name in shapes if name not in {*used} and not original.unused(name))
    facts = {key: value for key, value in tensors.metadata.items() if key not in (original.CONFIG, "format")}
    assumed = () if config else ("schedule.shift", "image_size")
    return Checkpoint(path, "original single file", made, parts, assumed, tuple(remarks), foreign, facts)


def completed(config: ModelConfig) -> ModelConfig:
    """`config`, made of shapes or of diffusers' files, with what all Stable Diffusion 3 have."""
    assert isinstance(config.unet, MMDiTConfig)
    encoder = EncoderConfig(pooled=True, width=config.unet.context_width, t5_tokens=LENGTH)
    return replace(
        config,
        schedule=config.schedule or FLOW,
        parameterization="flow",
        image_size=SIDE,
        encoder=encoder if config.towers else EncoderConfig(),
    )


def tower(source: Source, prefix: str, file: Path, kind: TextConfig) -> tuple[TextConfig, Part]:
    """A CLIP in Hugging Face's names behind `prefix`: its config, by shapes and `kind`, and where it is.

    A projection that is not there is the identity, which is how the first tower's pooled text is used.
    """
    inner = f"{prefix}text_model." if f"{prefix}text_model.final_layer_norm.weight" in source else prefix
    shapes = {name: source.form(name)[1] for name in source}
    config = original.text_config(within(shapes, inner), inner)
    changed, embed_dim = with_projection(source, f"{prefix}{PROJECTION}", f"{inner}final_layer_norm.weight")
    same = ("padding", "cleaning", "quick_gelu", "layer", "final_norm")
    config = replace(config, embed_dim=embed_dim, **{name: getattr(kind, name) for name in same})
    return config, clip_part(changed, prefix, inner, file)


def clip_part(source: Source, prefix: str, inner: str, file: Path) -> Part:
    """A CLIP's place in a source that has its projection as ours is, `prefix` before all its names."""

    def names(keys: Iterable[str]) -> Names:
        keys = list(keys)
        return {**clip_names([key for key in keys if key != "text_projection"], inner), **_projected(keys, prefix)}

    scope = tuple(name for name in source if name.startswith(prefix) and not name.endswith("position_ids"))
    return Part(source, names, scope, str(file))


def with_projection(source: Source, name: str, like: str) -> tuple[Source, int]:
    """`source` with a projection of the features as ours is, (D, E), and E: theirs turned, or the identity."""
    if name in source:
        width, features = source.form(name)[1][::-1]
        return Changed(source, {name: Made((width, features), lambda: source[name].T, name)}), features
    (width,) = source.form(like)[1]
    return Changed(source, {name: Made((width, width), lambda: torch.eye(width), like)}), width


def _projected(keys: Collection[str], prefix: str) -> Names:
    return {"text_projection": (f"{prefix}{PROJECTION}",)} if "text_projection" in keys else {}


def _part(tensors: Source, prefix: str, names: object, path: Path) -> Part:
    scope = tuple(name for name in tensors if name.startswith(prefix) and not original.unused(name))
    return Part(tensors, names, scope, str(path))  # type: ignore[arg-type]


def _beside(path: Path, stem: str) -> Path | None:
    """The file of a tower that is published beside the model."""
    places = (path.parent / f"{stem}.safetensors", path.parent / "text_encoders" / f"{stem}.safetensors")
    return next((place for place in places if place.is_file()), None)


# ---------------------------------------------------------------- writing


def unsayable(config: ModelConfig, to: str) -> list[str]:
    """What of a model with this transformer foreign files have no words for; names settings."""
    unet, autoencoder, found = config.unet, config.autoencoder, list[str]()
    assert isinstance(unet, MMDiTConfig)
    if unet.streams != 2 or not unet.context_width or not unet.vector_width or unet.classes:
        found.append("a transformer of one stream, or of classes")
    elif to == "original" and unet.width != mmdit.HEAD * unet.heads and not unet.qk_norm:
        found.append(f"unet.heads={unet.heads}, which are not {mmdit.HEAD} wide")
    if config.parameterization != "flow" or config.schedule is None or config.schedule.kind != "flow":
        found.append(f"parameterization={config.parameterization}, or a schedule other than flow")
    elif to == "original" and config.schedule.shift != FLOW.shift:
        found.append(f"schedule.shift={config.schedule.shift:g}, which its readers take for {FLOW.shift:g}")
    if unet.in_channels != unet.out_channels or config.learned_variance:
        found.append(f"unet.in_channels={unet.in_channels}")
    if autoencoder is not None and autoencoder.latent_convs:
        found.append("autoencoder.latent_convs=True")
    if to == "original" and autoencoder is not None and (autoencoder.shift, autoencoder.scale) != ((SHIFT,), (SCALE,)):
        found.append(f"a latent's shift and scale other than {SHIFT} and {SCALE}")
    if set(config.towers) != {"text", "text_2"} or not config.encoder.pooled or not config.encoder.t5_tokens:
        found.append("text towers that are not told as Stable Diffusion 3's")
    for name, text in config.towers.items():
        kind = CLIP if name == "text" else BIGG
        for setting in ("layer", "final_norm", "padding", *(("quick_gelu",) if to == "original" else ())):
            if getattr(text, setting) != getattr(kind, setting):
                found.append(f"{name}.{setting}={getattr(text, setting)}")
        if not text.embed_dim or text.token_ids:
            found.append(f"{name}.embed_dim=0, or a table of some tokens")
    return found


def clip_tensors(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP's state in Hugging Face's names, with its projection turned."""
    names = clip_names([key for key in state if key != "text_projection"], f"{prefix}text_model.")
    tensors = exported({key: state[key] for key in names}, names)
    return tensors | {f"{prefix}{PROJECTION}": state["text_projection"].T.contiguous()}


def write_single_file(path: Path, config: ModelConfig, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write one safetensors file, with our config in its metadata."""
    assert config.autoencoder is not None
    tensors = exported(states["unet"], mmdit.original_names(states["unet"], UNET))
    names = original.autoencoder_names(states["autoencoder"], config.autoencoder)
    tensors |= exported(states["autoencoder"], names)
    for name, theirs in TOWERS.items():
        tensors |= clip_tensors(states[name], f"text_encoders.{theirs}.transformer.")
    if "t5" in states:
        tensors |= t5.written(states["t5"], t5.PREFIX, twice=True)
        if "tokenizer" in states["t5"]:
            tensors[f"{t5.PREFIX}{t5.TOKENIZER}"] = states["t5"]["tokenizer"]
    words = {"format": "pt", original.CONFIG: json.dumps(to_dict(config)), "modelspec.prediction_type": "flow"}
    with atomic_write(path) as temporary:
        write_tensors(tensors, temporary, words)
