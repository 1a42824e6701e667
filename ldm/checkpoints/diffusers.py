"""A diffusers directory: a folder and a JSON for each network; diffusers_configs.py has what the JSONs say.

    model_index.json                                   which pipeline it is
    unet/       config.json  diffusion_pytorch_model.safetensors (or shards and an index; or .bin; or a variant, .fp16)
    vae/        config.json  diffusion_pytorch_model.safetensors
    text_encoder/  config.json  model.safetensors      in Hugging Face's names (transformers 5 dropped "text_model.")
    tokenizer/  tokenizer_config.json  vocab.json  merges.txt  ...
    text_encoder_2/  tokenizer_2/                      of XL, with a projection; its refiner has no others
    scheduler/  scheduler_config.json                  the noise schedule, and whether eps or v is predicted

A folder of an autoencoder alone, and its weights alone, are read too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoints import diffusers_configs as configs
from ldm.checkpoints import edm, sdxl
from ldm.checkpoints.architectures import assumed_side
from ldm.checkpoints.common_names import GROUPS, TRANSFORMER, autoencoder_of_shapes, clip_names
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.said import Said, by_tensors, follow, marker, settle
from ldm.checkpoints.scaled import unscaled
from ldm.checkpoints.scheduler_config import drawing_of, read_scheduler
from ldm.checkpoints.state import Joined, Names, Rules, Source, Turned, names_by, rename, some
from ldm.errors import UserError
from ldm.model_config import TOWERS, AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig
from ldm.plain import read_json

NETWORKS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")
WEIGHTS = {**NETWORKS, "text_encoder": "model"}
PICKLES = {**NETWORKS, "text_encoder": "pytorch_model"}
FOLDERS = {"unet": "unet", "autoencoder": "vae", "text": "text_encoder"}
ALONE = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "transformer"}  # class -> its folder in a model
TOKENIZERS, CHECKING = ("tokenizer", "tokenizer_2"), ("safety_checker", "feature_extractor")
USUAL = (*FOLDERS.values(), "text_encoder_2", *TOKENIZERS, "scheduler", *CHECKING)  # what a pipeline has
TOWERS_THERE = ("", "_2")  # the ends of the names of text towers' folders
PROJECTION = "text_projection.weight"
LATENT_CONSISTENCY = "LatentConsistencyModel"  # what the names of their pipelines begin with
UNUSED = r"position_ids$|^text_projection\.weight$"  # computed; of the joint space, which nothing here draws with

BLOCKS: Rules = (
    (r"^time_embedding\.linear_in", "time_embedding.linear_1"),
    (r"^time_embedding\.linear_out", "time_embedding.linear_2"),
    (r"^guidance_embedding", "time_embedding.cond_proj"),
    (r"^vector_embedding\.linear_in", "add_embedding.linear_1"),
    (r"^vector_embedding\.linear_out", "add_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^middle\.0\.residual", "mid_block.resnets.0"),
    (r"^middle\.0\.transformer", "mid_block.attentions.0"),
    (r"^middle\.1\.residual", "mid_block.resnets.1"),
    (r"^(down|up)\.(\d+)\.stages\.(\d+)\.residual", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.stages\.(\d+)\.transformer", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.resample", r"\1_blocks.\2.\1samplers.0"),
    (r"(resnets\.\d+)\.norm_in", r"\1.norm1"),
    (r"(resnets\.\d+)\.conv_in", r"\1.conv1"),
    (r"(resnets\.\d+)\.embedding", r"\1.time_emb_proj"),
    (r"(resnets\.\d+)\.norm_out", r"\1.norm2"),
    (r"(resnets\.\d+)\.conv_out", r"\1.conv2"),
    (r"(resnets\.\d+)\.shortcut", r"\1.conv_shortcut"),
)
FIRST_STAGE: Rules = (
    (r"^to_moments", "quant_conv"),
    (r"^from_latent", "post_quant_conv"),
    (r"^encoder\.levels\.(\d+)\.resample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"^decoder\.levels\.(\d+)\.resample", r"decoder.up_blocks.\1.upsamplers.0"),
    (r"^encoder\.levels\.(\d+)\.blocks", r"encoder.down_blocks.\1.resnets"),
    (r"^decoder\.levels\.(\d+)\.blocks", r"decoder.up_blocks.\1.resnets"),
    (r"\.middle\.block_1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block_2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention\.", ".mid_block.attentions.0."),
    (r"\.(norm|conv)_([12])\.", r".\1\2."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
ATTENTION: Rules = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.out\.", ".to_out.0."),
)
FIRST_STAGE_PLACES = (
    "encoder.down_blocks.{}.resnets.{}.conv1.weight",
    "encoder.mid_block.attentions.0.group_norm.weight",
)
"""What `autoencoder_of_shapes` looks for."""
OLD_ATTENTION: Rules = ((r"(attentions\.0)\.out\.", r"\1.proj_attn."),)  # until diffusers 0.18: query, key, value


# ---------------------------------------------------------------- names


def unet_names(keys: Iterable[str]) -> Names:
    """Our names -> theirs."""
    return names_by(keys, lambda key: rename(rename(key, BLOCKS), TRANSFORMER))


def autoencoder_names(keys: Iterable[str], old: bool = False) -> Names:
    """Our names -> theirs; `old` are those of the attention in the first files that were published."""
    rules = (*FIRST_STAGE, *(OLD_ATTENTION if old else ATTENTION))
    return names_by(keys, lambda key: rename(key, rules))


# ---------------------------------------------------------------- opening


def is_pipeline(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a directory of several networks."""
    return tensors is None and (path / "model_index.json").is_file()


def is_autoencoder(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a folder of one network, or a file of an autoencoder's weights."""
    if tensors is None:
        return (path / "config.json").is_file()
    return "encoder.conv_in.weight" in tensors and any(name.startswith("encoder.down_blocks.") for name in tensors)


def open_directory(path: Path, weights: str = "auto", decided: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a directory with a model_index.json; its parts are those whose folders are there.

    `weights`: "raw" takes the variant non_ema of the U-Net, "ema" and "auto" the plain one. `decided` are the settings
    that the user names, so it does not matter what the files say of them. Raises UserError.
    """
    index = read_json(path / "model_index.json")
    pipeline = str(index.get("_class_name", ""))
    if not pipeline.startswith(("StableDiffusion", LATENT_CONSISTENCY)) or pipeline.startswith("StableDiffusion3"):
        raise UserError(
            f"{path} is a {pipeline[:60] or 'nameless pipeline'}; only Stable Diffusion v1, v2 and XL are read, and "
            "latent consistency models of these"
        )
    parts: dict[str, Part] = {}
    settings: dict[str, Any] = {}
    assumed: list[str] = []
    said: list[Said] = []
    remarks: tuple[str, ...] = ()
    side = None
    if (path / "unet").is_dir():
        where = path / "unet" / "config.json"
        plain = read_json(where)
        side = configs.latent_side(plain, str(where))
        settings |= {"unet": configs.read_unet(plain, str(where)), "schedule": ScheduleConfig()}
        source = open_weights(path / "unet", "unet", raw=weights == "raw")
        parts["unet"] = part_of(source, path / "unet", unet_names, GROUPS)
        where = path / "scheduler" / "scheduler_config.json"
        said, remarks = read_scheduler(scheduler := read_json(where), _scheduler_class(index), str(where))
        settings["drawing"], by_kind = drawing_of(scheduler, _scheduler_class(index), settings["unet"])
        assumed += ["drawing.sampler"] * by_kind
        said += by_tensors(source) + edm.by_tensors(source)
    unscaled_latent = False
    if (path / "vae").is_dir():
        settings["autoencoder"], parts["autoencoder"], unscaled_latent = autoencoder_in(path / "vae")
    folders = [f"text_encoder{which}" for which in TOWERS_THERE if (path / f"text_encoder{which}").is_dir()]
    for part, folder in zip(TOWERS, folders, strict=False):
        padding = padding_of(path / folder.replace("text_encoder", "tokenizer"))
        if padding is None:
            padding = "eot"
            assumed.append(f"{part}.padding")
        settings[part], parts[part] = _tower(path / folder, padding)
    if not parts:
        raise UserError(f"{path} has a model_index.json and none of the folders unet, vae and text_encoder")
    config = ModelConfig(**settings)
    if "unet" in parts and sdxl.is_xl(config) != pipeline.startswith("StableDiffusionXL"):
        taken = "a" if sdxl.is_xl(config) else "no"
        raise UserError(f"{path} is a {pipeline[:60]}, and its U-Net is told {taken} vector of sizes; copy it again")
    if sdxl.is_xl(config):
        config = _said_of_xl(sdxl.completed(config, path, scaled=not unscaled_latent), index)
    config = follow(config, settle(said, path, decided))
    if side is not None and config.autoencoder is not None:
        config = replace(config, image_size=side * config.autoencoder.factor)
    elif "unet" in parts:
        config = replace(config, image_size=assumed_side(config))
        assumed.append("image_size")
    others = [name[:60] for name, kind in index.items() if isinstance(kind, list) and any(kind) and name not in USUAL]
    if others:
        remarks += (f"the U-Net in {path} draws without {some(others)}, which the pipeline has and is not read here",)
    facts = {"pipeline": pipeline}
    if "_diffusers_version" in index:
        facts["diffusers"] = str(index["_diffusers_version"])[:40]
    return Checkpoint(path, "diffusers directory", config, parts, tuple(assumed), remarks, facts=facts)


def _tower(folder: Path, padding: str) -> tuple[TextConfig, Part]:
    """A text tower; only that of a second folder is used with its projection, which v1's and v2's may have too."""
    where = folder / "config.json"
    config = configs.read_text(read_json(where), padding, str(where))
    source = open_weights(folder, "text_encoder")
    prefix = "text_model." if "text_model.final_layer_norm.weight" in source else ""
    if folder.name == "text_encoder" or PROJECTION not in source:
        return config, part_of(source, folder, partial(clip_names, prefix=prefix), 0)
    config = replace(config, embed_dim=source.form(PROJECTION)[1][0])
    names = partial(clip_names, prefix=prefix, projection=PROJECTION)
    return config, part_of(Turned(source, PROJECTION), folder, names, 0)


def _said_of_xl(config: ModelConfig, index: Mapping[str, Any]) -> ModelConfig:
    """`config` with what model_index.json says of how an XL model is told empty prompts and scores."""
    encoder = config.encoder
    zeros, score = index.get("force_zeros_for_empty_prompt"), index.get("requires_aesthetics_score")
    if isinstance(zeros, bool):
        encoder = replace(encoder, empty="zeros" if zeros else "encoded")
    if isinstance(score, bool) and score != encoder.score:
        raise UserError(
            f"requires_aesthetics_score is {score} in model_index.json, which does not go with "
            f"{len(config.towers)} text towers: the refiner has one and is told a score"
        )
    return replace(config, encoder=encoder)


def _scheduler_class(index: Mapping[str, Any]) -> str:
    """What model_index.json says of it: ["diffusers", "DDIMScheduler"]."""
    found = index.get("scheduler")
    return str(found[1] or "") if isinstance(found, list) and len(found) == 2 else ""


def open_autoencoder(path: Path, tensors: Tensors | None) -> Checkpoint:
    """The checkpoint in a folder with the config.json and the weights of an AutoencoderKL, or in a single file of these
    weights, `tensors`; a config.json beside it is read.
    """
    if tensors is None:
        alone = ALONE.get(str(read_json(path / "config.json").get("_class_name")))
        if alone is not None:
            raise UserError(
                f"{path} is a network without the rest of its model: put it in the place of the folder {alone} in a "
                "copy of the model that it was made of (a directory of diffusers), and name that copy"
            )
        config, part, assumed = autoencoder_in(path)
    else:
        part = _autoencoder_part(tensors, path)
        if (path.parent / "config.json").is_file():
            config, assumed = _autoencoder_config(path.parent / "config.json")
        else:
            shapes = {name: tensors.form(name)[1] for name in tensors}
            config, assumed = autoencoder_of_shapes(shapes, path, *FIRST_STAGE_PLACES), True
    told = ("autoencoder.scale",) if assumed else ()
    return Checkpoint(path, "diffusers autoencoder", ModelConfig(config), {"autoencoder": part}, told)


def autoencoder_in(folder: Path) -> tuple[AutoencoderConfig, Part, bool]:
    config, assumed = _autoencoder_config(folder / "config.json")
    part = _autoencoder_part(open_weights(folder, "vae"), folder)
    return config, part, assumed


def _autoencoder_config(where: Path) -> tuple[AutoencoderConfig, bool]:
    """And whether it does not say its scale, as the first published ones do not."""
    plain = read_json(where)
    name = plain.get("_class_name") or plain.get("architectures") or "AutoencoderKL"  # the second: of transformers
    if name != "AutoencoderKL":
        kind = str(name).strip("[']")[:60]
        raise UserError(f"{where} is of a {kind}, and of single networks only an AutoencoderKL is read")
    return configs.read_autoencoder(plain, str(where)), "scaling_factor" not in plain


def _autoencoder_part(source: Source, where: Path) -> Part:
    old = "encoder.mid_block.attentions.0.query.weight" in source
    return part_of(source, where, partial(autoencoder_names, old=old), 0)


def part_of(source: Source, where: Path, names: Any, groups: int) -> Part:
    scope = tuple(name for name in source if not re.search(UNUSED, name) and not marker(name))
    return Part(source, names, scope, str(where), groups)


# ---------------------------------------------------------------- files


def open_weights(folder: Path, kind: str, raw: bool = False) -> Source:
    """The tensors of a network's folder: safetensors before pickles, the plain variant before fp16 and others."""
    variants = ["non_ema"] if raw else ["", "fp16", "bf16"]
    for stem, ending in ((WEIGHTS[kind], "safetensors"), (PICKLES[kind], "bin")):
        for variant in variants:
            file = folder / ".".join(filter(None, (stem, variant, ending)))
            index = folder / ".".join(filter(None, (stem, ending, "index", variant, "json")))
            if file.is_file():
                return unscaled(read_tensors(file))
            if index.is_file():
                return _open_shards(index)
    if raw:
        raise UserError(f"{folder} has no raw weights (variant non_ema) beside the averaged ones; leave out the choice")
    raise UserError(f"{folder} has no weights ({WEIGHTS[kind]}.safetensors); copy it again, weights included")


def _open_shards(index: Path) -> Source:
    """The tensors of all files that an index names; they must lie beside it, and hold what it says."""
    plain = read_json(index).get("weight_map")
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"{index} has no weight_map; copy it again")
    files = {str(file) for file in plain.values()}
    for file in sorted(files):
        if Path(file).name != file or file in (".", "..") or "\\" in file:
            raise UserError(f"{index} names a shard '{file[:100]}' that is not a file beside it, and was not followed")
    joined = Joined({file: unscaled(read_tensors(index.parent / file)) for file in sorted(files)})
    lost = [name for name in plain if name not in joined]
    if lost:
        raise UserError(f"the shards of {index} lack {len(lost)} tensors that it names ({some(lost)}); copy them again")
    return joined


def padding_of(folder: Path) -> str | None:
    """What the tokenizer pads with: "zero", "eot", or None if it does not say. Raises UserError for a third.

    A special_tokens_map.json goes before tokenizer_config.json unless that lists its added tokens, as transformers has
    it. The vocabulary has to be CLIP's.
    """
    tokens: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        tokens = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in tokens and (folder / "special_tokens_map.json").is_file():
        tokens |= read_json(folder / "special_tokens_map.json")
    if (folder / "vocab.json").is_file():
        from ldm.checkpoints.diffusers_tokenizer import vocabulary

        if read_json(folder / "vocab.json") != vocabulary():
            raise UserError(f"{folder / 'vocab.json'} is not CLIP's vocabulary, and no other can be read")
    token = tokens.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    padding = {"!": "zero", "<|endoftext|>": "eot"}.get(str(token))
    if padding is None:
        raise UserError(f"the tokenizer in {folder} pads with '{str(token)[:40]}'; only '!' and <|endoftext|> are read")
    return padding
