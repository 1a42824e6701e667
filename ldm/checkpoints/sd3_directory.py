"""Stable Diffusion 3 as a directory of diffusers, read and written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import diffusers, mmdit, sd3, t5
from ldm.checkpoints import diffusers_configs as configs
from ldm.checkpoints.diffusers_tokenizer import write_tokenizer
from ldm.checkpoints.diffusers_written import write_text
from ldm.checkpoints.reading import Tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.said import follow, settle
from ldm.checkpoints.scheduler_config import read_scheduler
from ldm.checkpoints.state import exported
from ldm.errors import UserError
from ldm.model_config import MMDiTConfig, ModelConfig
from ldm.plain import read_json

FOLDERS = {"text": "text_encoder", "text_2": "text_encoder_2"}


def is_directory(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a directory of a Stable Diffusion 3 pipeline."""
    index = path / "model_index.json"
    return tensors is None and index.is_file() and _pipeline(path).startswith("StableDiffusion3")


def _pipeline(path: Path) -> str:
    return str(read_json(path / "model_index.json").get("_class_name", ""))


def open_directory(path: Path, weights: str = "auto", decided: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a directory with a model_index.json; its parts are those whose folders are there."""
    settings: dict[str, Any] = {}
    parts, assumed = {}, []
    where = path / "transformer" / "config.json"
    if not where.is_file():
        raise UserError(f"{path} is a StableDiffusion3Pipeline without a folder transformer; copy it again")
    plain = read_json(where)
    settings["unet"] = mmdit.read_config(plain, str(where))
    source = mmdit.halves_in_order(diffusers.open_weights(path / "transformer", "transformer"))
    parts["unet"] = diffusers.part_of(source, path / "transformer", mmdit.diffusers_names, 0)
    where = path / "scheduler" / "scheduler_config.json"
    said, remarks = read_scheduler(read_json(where), "", str(where)) if where.is_file() else ([], ())
    assumed += [] if said else ["schedule.shift"]
    if (path / "vae").is_dir():
        settings["autoencoder"], parts["autoencoder"], _ = diffusers.autoencoder_in(path / "vae")
    for name, folder in FOLDERS.items():
        if not (path / folder).is_dir():
            continue
        padding = diffusers.padding_of(path / _tokenizer(folder))
        if padding is None:
            padding = "eot" if name == "text" else "zero"
            assumed.append(f"{name}.padding")
        where = path / folder / "config.json"
        text = configs.read_text(read_json(where), padding, str(where))
        source = diffusers.open_weights(path / folder, "text_encoder")
        inner = "text_model." if "text_model.final_layer_norm.weight" in source else ""
        source, embed_dim = sd3.with_projection(source, sd3.PROJECTION, f"{inner}final_layer_norm.weight")
        settings[name] = replace(text, embed_dim=embed_dim, layer="penultimate", final_norm=False)
        parts[name] = sd3.clip_part(source, "", inner, path / folder)
    config = sd3.completed(follow(ModelConfig(schedule=sd3.FLOW, **settings), settle(said, path, decided)))
    if (path / "text_encoder_3").is_dir() and config.towers and "t5" not in decided:
        third = t5.in_directory(path, diffusers.open_weights(path / "text_encoder_3", "text_encoder"))
        config, parts["t5"] = replace(config, t5=third[0]), Part(*third[1])
    side = configs.latent_side(plain, str(path / "transformer" / "config.json"))
    if side is not None and config.autoencoder is not None:
        config = replace(config, image_size=side * config.autoencoder.factor)
    return Checkpoint(path, "diffusers directory", config, parts, tuple(assumed), remarks)


def folders(
    config: ModelConfig, states: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Tensor]]]:
    """What the directory of a StableDiffusion3Pipeline has beside its autoencoder and tokenizers.

    Each is a folder of a network, its config.json, its kind and its tensors; or a JSON file, of no kind.
    """
    assert isinstance(config.unet, MMDiTConfig) and config.autoencoder is not None and config.schedule is not None
    tensors = exported(states["unet"], mmdit.diffusers_names(states["unet"]))
    tensors |= {name: mmdit.halves_swapped(tensors[name]) for name in mmdit.swapped_names(tensors) if name in tensors}
    side = config.image_size // config.autoencoder.factor
    yield "transformer", mmdit.write_config(config.unet, side), "transformer", tensors
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.30.0",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    for name, folder in FOLDERS.items():
        plain = write_text(config.towers[name]) | {"architectures": ["CLIPTextModelWithProjection"]}
        yield folder, plain, "text_encoder", sd3.clip_tensors(states[name], "")
        index |= {folder: ["transformers", "CLIPTextModelWithProjection"]}
        index |= {_tokenizer(folder): ["transformers", "CLIPTokenizer"]}
    if config.t5 is not None:
        yield "text_encoder_3", t5.write_config(config.t5), "text_encoder", t5.written(states["t5"], "", twice=False)
        index |= {"text_encoder_3": ["transformers", "T5EncoderModel"]}
        index |= {"tokenizer_3": ["transformers", "T5TokenizerFast"]} if config.t5.tokenizer else {}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    yield "scheduler/scheduler_config.json", scheduler | {"shift": config.schedule.shift}, "", {}
    yield "model_index.json", index, "", {}


def write_tokenizers(path: Path, config: ModelConfig, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, folder in FOLDERS.items():
        write_tokenizer(path / _tokenizer(folder), config.towers[name])
    if config.t5 is not None and config.t5.tokenizer:
        t5.write_tokenizer(path / "tokenizer_3", bytes(states["t5"]["tokenizer"].cpu().numpy()))


def _tokenizer(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")
