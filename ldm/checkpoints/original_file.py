"""Opening and writing the original single file of Stable Diffusion; original.py has its names.

What its tensors do not tell comes, in this order, from our own config in its metadata (files that we wrote), a YAML
of the same name beside it, the `modelspec.` words in its metadata, the rules in architectures.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import original
from ldm.checkpoints.architectures import assumed_prediction
from ldm.checkpoints.reading import Tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.state import Names, Shape, exported
from ldm.checkpoints.writing import write_tensors
from ldm.config import ModelConfig, ScheduleConfig, TextConfig, from_dict, to_dict
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.plain import parse_json, read_yaml_text

GROUPS = 32  # of every norm, in all of these networks
CONFIG = "ldm.config"  # the metadata's key of our own config, in files that we wrote
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # their names -> ours
PREDICTIONS = {"epsilon": "eps", "v": "v", "v_prediction": "v"}  # of modelspec


def recognise(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an original model or autoencoder."""
    return any(
        name.startswith((original.UNET, original.AUTOENCODER, "encoder.down.", original.CLIP_TEXT)) for name in names
    )


def open_original(path: Path, tensors: Tensors, weights: str = "auto") -> Checkpoint:
    """The checkpoint in `path`, whose tensors these are.

    `weights` says which U-Net is meant where there are two: "ema", its average, or "raw"; "auto" is the average where
    there is one. Raises UserError for networks that are not Stable Diffusion's, or weights that are not there.
    """
    shapes = {name: tensors.form(name)[1] for name in tensors}
    own = tensors.metadata.get(CONFIG)
    config = _own_config(own, path) if own else None
    parts: dict[str, Part] = {}
    remarks: list[str] = []
    used: set[str] = set()

    def add(part: str, prefix: str, names: Callable[[Iterable[str]], Names]) -> None:
        scope = tuple(name for name in shapes if name.startswith(prefix) and not original.unused(name))
        used.update(scope)
        parts[part] = Part(tensors, names, scope, str(path), 0 if part == "text" else GROUPS)

    unet = autoencoder = text = None
    averaged = any(name.startswith(original.EMA) and not original.unused(name) for name in shapes)
    if f"{original.UNET}input_blocks.0.0.weight" in shapes:
        unet = config.unet if config else original.unet_config(_within(shapes, original.UNET))
        if weights == "ema" and not averaged:
            raise UserError(f"{path} has no averaged weights beside the raw ones; leave out the choice, or take raw")
        ema = averaged and weights != "raw"
        if averaged and weights == "auto":
            remarks.append(f"{path} has raw and averaged weights of the U-Net; the averaged ones (EMA) are used")
        add("unet", original.EMA if ema else original.UNET, partial(_unet_names, config=unet, ema=ema))
        used.update(name for name in shapes if name.startswith((original.EMA, original.UNET)))
    prefix = original.AUTOENCODER if f"{original.AUTOENCODER}encoder.conv_in.weight" in shapes else ""
    if f"{prefix}encoder.conv_in.weight" in shapes:
        autoencoder = config.autoencoder if config else original.autoencoder_config(_within(shapes, prefix))
        add("autoencoder", prefix, partial(_autoencoder_names, config=autoencoder, prefix=prefix))
    prefix = original.text_prefix(shapes)
    if prefix:
        text = config.text if config else original.text_config(_within(shapes, prefix), prefix)
        add("text", prefix, partial(original.text_names, prefix=prefix))
        if text is not None and not config and prefix == original.OPEN_CLIP_TEXT:
            layers = "all its blocks" if text.layer == "last" else "all blocks but the last"
            remarks += [] if text.layer == "penultimate" else [f"the text tower's context is taken after {layers}"]
    assumed: tuple[str, ...] = ()
    if config is None:
        config = ModelConfig(autoencoder, text, unet, ScheduleConfig() if unet else None)
        config, assumed = _complete(config, path, tensors)
    foreign = tuple(name for name in shapes if name not in used and not original.unused(name))
    layout = "original single file" if unet else "original autoencoder" if not text else "original networks"
    facts = {key: value for key, value in tensors.metadata.items() if key not in (CONFIG, "format")}
    return Checkpoint(path, layout, config, parts, assumed, tuple(remarks), foreign, facts, averaged)


def _unet_names(keys: Iterable[str], config: Any, ema: bool) -> Names:
    names = original.unet_names(keys, config)
    return original.ema_names(names) if ema else names


def _autoencoder_names(keys: Iterable[str], config: Any, prefix: str) -> Names:
    return original.autoencoder_names(keys, config, prefix)


def _within(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


# ---------------------------------------------------------------- what the tensors do not tell


def _own_config(document: str, path: Path) -> ModelConfig:
    where = f"the config in {path}"
    return from_dict(ModelConfig, parse_json(document, where), where)


def _complete(config: ModelConfig, path: Path, tensors: Tensors) -> tuple[ModelConfig, tuple[str, ...]]:
    """`config` with what shapes leave open filled in, and the settings that only rules decided."""
    told: set[str] = set()
    if config.unet is not None:
        config = replace(config, parameterization=assumed_prediction(config.unet))
    if "alphas_cumprod" in tensors:
        schedule = original.schedule_of(tensors["alphas_cumprod"], tensors.get("betas"))
        if schedule is None:
            raise UserError(
                f"{path} was trained with a noise schedule that is not read here (its table alphas_cumprod is neither "
                "linear, scaled linear nor cosine); nothing else would draw right pictures with it"
            )
        config = replace(config, schedule=schedule)
    scale = tensors.get("scale_factor")
    if scale is not None and scale.numel() == 1 and config.autoencoder is not None:  # measured by its training
        config = replace(config, autoencoder=replace(config.autoencoder, scale=(float(scale),)))
        told.add("autoencoder.scale")
    words = tensors.metadata
    if words.get("modelspec.prediction_type") in PREDICTIONS:
        config = replace(config, parameterization=PREDICTIONS[words["modelspec.prediction_type"]])
        told.add("parameterization")
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        config, said = _read_yaml(config, beside)
        told |= said
    side = words.get("modelspec.resolution", "").partition("x")[0]
    if side.isdecimal() and 0 < int(side) < 1 << 16:
        config, told = replace(config, image_size=int(side)), told | {"image_size"}
    else:
        config = replace(config, image_size=768 if config.parameterization == "v" else 512)
    open_ = [("autoencoder", "autoencoder.scale")]
    if config.unet is not None:
        open_ = [("unet", "parameterization"), ("unet", "image_size"), *open_]
        if config.text is not None:
            open_ += [("text", f"text.{name}") for name in ("quick_gelu", "layer", "padding")]
        # A whole model's scale is Stable Diffusion's, as its architecture is; a stand-alone autoencoder's is not known.
        told.add("autoencoder.scale")
    return config, tuple(key for part, key in open_ if getattr(config, part) is not None and key not in told)


def _read_yaml(config: ModelConfig, path: Path) -> tuple[ModelConfig, set[str]]:
    """The settings of the training script's YAML: `config` with them, and which they are."""
    import yaml

    plain = yaml.safe_load(read_yaml_text(path))
    model = _dict(_dict(_dict(plain).get("model")).get("params"))
    if not model:
        return config, set()
    unet = _dict(_dict(model.get("unet_config")).get("params"))
    stage = _dict(model.get("cond_stage_config"))
    told = {"parameterization"}
    try:
        schedule = ScheduleConfig(
            kind=BETAS[model.get("beta_schedule", "linear")],
            steps=int(model.get("timesteps", 1000)),
            beta_start=float(model.get("linear_start", 1e-4)),
            beta_end=float(model.get("linear_end", 2e-2)),
            zero_terminal_snr=config.schedule.zero_terminal_snr if config.schedule else False,
        )
        config = replace(config, schedule=schedule, parameterization=str(model.get("parameterization", "eps")))
        if config.unet is not None and ("num_heads" in unet or "num_head_channels" in unet):
            width = int(unet.get("num_head_channels", -1))
            heads = 0 if width > 0 else int(unet["num_heads"])
            config = replace(config, unet=replace(config.unet, heads=heads, head_width=max(width, 0)))
        if config.autoencoder is not None and "scale_factor" in model:
            scale = (float(model["scale_factor"]),)
            config = replace(config, autoencoder=replace(config.autoencoder, scale=scale))
            told.add("autoencoder.scale")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} has a setting that is not read here ({error}); correct or remove the file") from error
    target = str(stage.get("target", ""))
    if config.text is not None and target.endswith(("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder")):
        told |= {"text.quick_gelu", "text.padding", "text.layer"}
        layer = _dict(stage.get("params")).get("layer", "last")
        if target.endswith("FrozenOpenCLIPEmbedder") and layer in ("last", "penultimate") and config.text.layers != 23:
            config = replace(config, text=replace(config.text, layer=layer))
    return config, told


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- writing


def in_hugging_face_names(config: TextConfig, state: Mapping[str, Tensor]) -> bool:
    """Whether a text tower is written as v1's is; v2's way has room for the projection and for what lies after."""
    return config.layer == "last" and "text_projection" not in state


def write_original(path: Path, config: ModelConfig, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write one safetensors file of networks that `export.prepare` made fit for it, with our config in its metadata.

    The text tower gets v1's names, Hugging Face's, if it has no more than v1's has, else v2's, which are open_clip's.
    """
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        if name == "unet":
            assert config.unet is not None
            tensors |= exported(state, original.unet_names(state, config.unet))
        elif name == "autoencoder":
            assert config.autoencoder is not None
            prefix = original.AUTOENCODER if "unet" in states else ""
            tensors |= exported(state, original.autoencoder_names(state, config.autoencoder, prefix))
        else:
            assert config.text is not None
            hugging_face = in_hugging_face_names(config.text, state)
            prefix = f"{original.CLIP_TEXT}text_model." if hugging_face else original.OPEN_CLIP_TEXT
            tensors |= exported(state, original.text_names(state, prefix))
            if hugging_face:
                length = state["positional_embedding"].shape[0]
                tensors[f"{prefix}embeddings.position_ids"] = torch.arange(length).unsqueeze(0)
    if config.schedule is not None and "unet" in states:
        tensors |= original.tables(config.schedule)
    with atomic_write(path) as temporary:
        write_tensors(tensors, temporary, {"format": "pt", CONFIG: json.dumps(to_dict(config))})
