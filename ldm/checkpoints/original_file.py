"""Opening and writing the original single file of Stable Diffusion; original.py has its names.

What its tensors do not tell, others say: our own config in its metadata (files that we wrote), marker tensors, words in
the metadata, a YAML of the same name beside it, the table of its noise schedule. Two that disagree are an error
(said.py). What none says is decided by the rules in architectures.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import edm, original, sdxl
from ldm.checkpoints.architectures import LCM, assumed_prediction, assumed_side
from ldm.checkpoints.common_names import GROUPS, autoencoder_of_shapes
from ldm.checkpoints.original_yaml import read_yaml
from ldm.checkpoints.reading import Tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.said import (
    ZERO_SNR,
    Said,
    by_tensors,
    by_words,
    follow,
    marker,
    names_schedule,
    range_remark,
    settle,
)
from ldm.checkpoints.scaled import Scaled, unscaled
from ldm.checkpoints.state import Names, exported, within
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.model_config import TOWERS, AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from ldm.settings import to_dict

PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "sample"}  # ours -> those of the metadata's common words
USUAL_LAYER = {True: "penultimate", False: "last"}  # of a text tower in OpenCLIP's names, in Hugging Face's
COMPARED = ("parameterization", "schedule", ZERO_SNR, "text.layer")  # with our own config, where that is there


def is_original(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a file of an original model or autoencoder."""
    starts = (original.UNET, original.AUTOENCODER, "encoder.down.", original.CLIP_TEXT, original.XL_TEXT)
    return tensors is not None and any(name.startswith(starts) for name in tensors)


def open_original(path: Path, stored: Tensors, weights: str = "auto", decided: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in `path`, whose tensors these are.

    `weights` says which U-Net is meant where there are two: "ema", its average, or "raw"; "auto" is the average where
    there is one. `decided` are the settings that the user names, so it does not matter what the file says of them.
    Raises UserError for networks that are not Stable Diffusion's, weights that are not there, and a file that
    contradicts itself.
    """
    tensors = unscaled(stored)
    shapes = {name: tensors.form(name)[1] for name in tensors}
    config = own = original.own_config(tensors.metadata, path)
    parts: dict[str, Part] = {}
    remarks: list[str] = []
    used: set[str] = set()

    def add(part: str, prefix: str, names: Callable[[Iterable[str]], Names]) -> None:
        scope = tuple(n for n in shapes if n.startswith(prefix) and not original.unused(n) and not marker(n))
        used.update(scope)
        parts[part] = Part(tensors, names, scope, str(path), GROUPS if part == "unet" else 0)

    unet = autoencoder = None
    averaged = any(name.startswith(original.EMA) and not original.unused(name) for name in shapes)
    if f"{original.UNET}input_blocks.0.0.weight" in shapes:
        unet = config.unet if config else original.unet_config(within(shapes, original.UNET))
        if weights == "ema" and not averaged:
            raise UserError(f"{path} has no averaged weights beside the raw ones; leave out the choice, or take raw")
        ema = averaged and weights != "raw"
        if averaged and weights == "auto":
            remarks.append(f"{path} has raw and averaged weights of the U-Net; the averaged ones (EMA) are used")
        add("unet", original.EMA if ema else original.UNET, partial(_unet_names, config=unet, ema=ema))
        used.update(name for name in shapes if name.startswith((original.EMA, original.UNET)))
    prefix = original.AUTOENCODER if f"{original.AUTOENCODER}encoder.conv_in.weight" in shapes else ""
    if f"{prefix}encoder.conv_in.weight" in shapes:
        autoencoder = (
            config.autoencoder
            if config
            else autoencoder_of_shapes(within(shapes, prefix), path, *original.FIRST_STAGE_PLACES)
        )
        add("autoencoder", prefix, partial(_autoencoder_names, config=autoencoder, prefix=prefix))
    prefixes = dict(zip(TOWERS, original.text_prefixes(shapes), strict=False))
    for part, prefix in prefixes.items():
        add(part, prefix, partial(original.text_names, prefix=prefix))
    if config is None:
        towers: dict[str, Any] = {
            part: original.text_config(within(shapes, prefix), prefix) for part, prefix in prefixes.items()
        }
        config = ModelConfig(autoencoder, unet=unet, schedule=ScheduleConfig() if unet else None, **towers)
        config = sdxl.completed(config, path) if sdxl.is_xl(config) else config
        config = replace(config, drawing=LCM) if config.told_guidance else config
    config, assumed, told = _complete(config, own is not None, path, tensors, decided)
    usual = USUAL_LAYER[original.in_open_clip(prefixes.get("text", ""))]
    if config.text is not None and not own and not sdxl.is_xl(config) and config.text.layer != usual:
        layers = "all its blocks" if config.text.layer == "last" else "all blocks but the last"
        remarks.append(f"the text tower's context is taken after {layers}")
    foreign = tuple(n for n in shapes if n not in used and not original.unused(n) and not marker(n))
    layout = "original single file" if unet else "original autoencoder" if not prefixes else "original networks"
    facts = {key: value for key, value in tensors.metadata.items() if key not in (original.CONFIG, "format")}
    return Checkpoint(path, layout, config, parts, assumed, (*remarks, *told), foreign, facts, averaged)


def _unet_names(keys: Iterable[str], config: Any, ema: bool) -> Names:
    names = original.unet_names(keys, config)
    return original.ema_names(names) if ema else names


def _autoencoder_names(keys: Iterable[str], config: Any, prefix: str) -> Names:
    return original.autoencoder_names(keys, config, prefix)


# ---------------------------------------------------------------- what the tensors do not tell


def _complete(
    config: ModelConfig, own: bool, path: Path, tensors: Tensors | Scaled, decided: Collection[str]
) -> tuple[ModelConfig, tuple[str, ...], tuple[str, ...]]:
    """`config` with what shapes leave open filled in, the settings that only rules decided, and remarks.

    An `own` config is whole, and only compared with what else the file says.
    """
    said = by_words(tensors.metadata, None if sdxl.is_xl(config) else config.text)
    remarks = range_remark(tensors.metadata)
    if config.unet is not None:
        said += by_tensors(tensors) + edm.by_tensors(tensors)
    if path.with_suffix(".yaml").is_file():
        by_yaml, told = read_yaml(path.with_suffix(".yaml"), config)
        said, remarks = said + by_yaml, remarks + told
    said = [one for one in said if one.key in COMPARED] + _by_own(config) if own else said + _by_scale(tensors, said)
    if config.unet is not None:
        said += _by_tables(tensors, path, said, decided)
    absent = ["autoencoder"] * (config.autoencoder is None) + ["schedule", "parameterization"] * (config.unet is None)
    answers = settle((one for one in said if one.key.partition(".")[0] not in absent), path, decided)
    if own:
        return config, (), remarks
    config = follow(config, answers)
    if config.unet is not None and "parameterization" not in answers:
        config = replace(config, parameterization=assumed_prediction(config))
    if "image_size" not in answers:
        config = replace(config, image_size=assumed_side(config))
    open_ = [("autoencoder", "autoencoder.scale")]
    if config.unet is not None:
        # A whole model's scale is Stable Diffusion's, as its architecture is; a stand-alone autoencoder's is not known.
        open_ = [("unet", "parameterization"), ("unet", "image_size")]
        open_ += [("unet", "drawing.sampler")] * config.told_guidance
        if config.text is not None and not sdxl.is_xl(config):
            open_ += [("text", f"text.{name}") for name in ("quick_gelu", "layer", "padding")]
    assumed = (key for part, key in open_ if getattr(config, part) is not None and key not in answers)
    return config, tuple(assumed), remarks


def _by_own(config: ModelConfig) -> list[Said]:
    where = "our config in its metadata"
    found = [Said("text.layer", config.text.layer, where)] if config.text is not None else []
    if config.unet is None:
        return found
    schedule = config.schedule or ScheduleConfig()
    plain = replace(schedule, zero_terminal_snr=False)
    values = (config.parameterization, plain, schedule.zero_terminal_snr)
    return found + [Said(*pair, where) for pair in zip(("parameterization", "schedule", ZERO_SNR), values, strict=True)]


def _by_tables(tensors: Tensors | Scaled, path: Path, said: Sequence[Said], decided: Collection[str]) -> list[Said]:
    """The schedule by its table; one that is unknown here is refused, unless the user has named a schedule.

    A table is not rescaled by those who go on from a model and rescale its schedule (ztsnr): it stays what the model
    had, so a plain table does not contradict them.
    """
    if "alphas_cumprod" not in tensors:
        return []
    likely = [one.value for one in said if one.key == "schedule" and one.value is not None]
    found = original.schedule_of(tensors["alphas_cumprod"], tensors.get("betas"), likely)
    if found is None and names_schedule(decided):
        return []
    if found is None:
        raise UserError(
            f"{path} was trained with a noise schedule that is not read here (its table alphas_cumprod is neither "
            "linear, scaled linear nor cosine); if that is wrong, say which it is: --set schedule.kind=scaled_linear"
        )
    where = "the table alphas_cumprod"
    rescaled = [Said(ZERO_SNR, True, where)] if found.zero_terminal_snr else []
    return [Said("schedule", replace(found, zero_terminal_snr=False), where), *rescaled]


def _by_scale(tensors: Tensors | Scaled, said: Sequence[Said]) -> list[Said]:
    """The latent's scale, which its training measured; as it was before the file was cast, where that is known."""
    scale = tensors.get("scale_factor")
    if scale is None or scale.numel() != 1:
        return []
    known = [one.value[0] for one in said if one.key == "autoencoder.scale"] + list(AutoencoderConfig().scale)
    stored = float(scale)
    value = next((exact for exact in known if float(torch.tensor(exact).to(scale.dtype)) == stored), stored)
    return [Said("autoencoder.scale", (value,), "the tensor scale_factor")]


# ---------------------------------------------------------------- writing


def in_hugging_face_names(config: TextConfig, state: Mapping[str, Tensor]) -> bool:
    """Whether a text tower is written as v1's is; v2's way has room for the projection, and means the last but one."""
    return "text_projection" not in state and (config.layer == "last" or config.quick_gelu)


def write_original(path: Path, config: ModelConfig, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write one safetensors file of networks that `export.prepare` made fit for it, with our config in its metadata.

    A text tower gets v1's names, Hugging Face's, if it has no more than v1's has, else v2's, which are open_clip's.
    What other readers would take to be otherwise is said in their words too: the prediction, the text tower's layer.
    """
    tensors: dict[str, Tensor] = {}
    hugging_face, xl = False, sdxl.is_xl(config)
    for name, state in states.items():
        if name == "unet":
            assert isinstance(config.unet, UNetConfig)
            tensors |= exported(state, original.unet_names(state, config.unet))
        elif name == "autoencoder":
            assert config.autoencoder is not None
            prefix = original.AUTOENCODER if "unet" in states else ""
            tensors |= exported(state, original.autoencoder_names(state, config.autoencoder, prefix))
        else:
            hugging_face = in_hugging_face_names(config.towers[name], state)
            prefix = f"{original.CLIP_TEXT}text_model." if hugging_face else original.OPEN_CLIP_TEXT
            if xl:
                number = list(config.towers).index(name)
                prefix = prefix.replace("cond_stage_model.", f"{original.XL_TEXT}{number}.")
            tensors |= exported(state, original.text_names(state, prefix))
            if hugging_face:
                length = state["positional_embedding"].shape[0]
                tensors[f"{prefix}embeddings.position_ids"] = torch.arange(length).unsqueeze(0)
    words: dict[str, str] = {}
    if config.unet is not None and "unet" in states:
        schedule = config.schedule or ScheduleConfig()
        tensors |= edm.markers(config) if xl or schedule.kind == "edm" else original.tables(schedule)
        words["modelspec.prediction_type"] = PREDICTIONS[config.parameterization]
        if config.parameterization == "v" and (schedule.zero_terminal_snr or assumed_prediction(config) != "v"):
            tensors["v_pred"] = torch.empty(0)
        if schedule.zero_terminal_snr:
            tensors["ztsnr"] = torch.empty(0)
    if config.text is not None and config.text.layer == "penultimate" and hugging_face and not xl:
        words["modelspec.encoder_layer"] = "2"
    with atomic_write(path) as temporary:
        write_tensors(tensors, temporary, {"format": "pt", original.CONFIG: json.dumps(to_dict(config)), **words})
