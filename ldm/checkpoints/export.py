"""Our models made fit for foreign formats, which have no place for all that ours may be.

What can be said in other words without a change of what is drawn is said so (`prepare`), what cannot is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints import diffusers, edm, original_file, sd3, sd3_directory, sdxl
from ldm.checkpoints import diffusers_written as written
from ldm.checkpoints.architectures import DEPTH, LCM, MASK, extra_channels
from ldm.checkpoints.diffusers_tokenizer import write_tokenizer
from ldm.checkpoints.foreign import PIPELINES, groups_of, refuse
from ldm.checkpoints.state import exported
from ldm.checkpoints.writing import write_tensors
from ldm.conditioning.clip import VOCABULARY
from ldm.errors import UserError
from ldm.files import atomic_write, atomic_write_text
from ldm.model_config import (
    AutoencoderConfig,
    DrawingConfig,
    MMDiTConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)

States = Mapping[str, Mapping[str, Tensor]]
"""Part ("autoencoder", "text", "unet") -> its tensors."""

OUTER_SCALE = 0.18215  # Stable Diffusion's


def write(path: str | Path, config: ModelConfig, states: States, to: str) -> list[str]:
    """Write a model in a format of foreign.FORMATS: "original", one safetensors file, or "diffusers", a directory.

    Returns sentences on what is said in other words there. Raises UserError for a model that the format cannot hold.
    """
    path = Path(path)
    refuse(config, states, to)
    if isinstance(config.unet, MMDiTConfig) and config.autoencoder is not None:
        if to == "original":
            sd3.write_single_file(_checked(path, to), config, states)
        else:
            _write_autoencoder(_checked(path, to) / "vae", config.autoencoder, states["autoencoder"])
            for place, plain, kind, tensors in sd3_directory.folders(config, states):
                _network(path / place, plain, tensors, kind) if kind else _json(path / place, plain)
            sd3_directory.write_tokenizers(path, config, states)
        return []
    config, states, remarks = prepare(config, states, to)
    (original_file.write_original if to == "original" else write_diffusers)(_checked(path, to), config, states)
    return remarks


def _checked(path: Path, to: str) -> Path:
    if to == "original" and path.suffix != ".safetensors":
        raise UserError(f"{path}: the original layout is one file; name it so that it ends in .safetensors")
    if to == "diffusers" and (path.suffix == ".safetensors" or (path.exists() and not path.is_dir())):
        raise UserError(f"{path} would be a file, and the diffusers layout is a directory; name one")
    return path


def prepare(config: ModelConfig, states: States, to: str) -> tuple[ModelConfig, States, list[str]]:
    """`config` and `states` in the words of format `to`, and a sentence for each change."""
    remarks: list[str] = []
    found = dict(states)
    autoencoder = config.autoencoder
    outer = sdxl.SCALE if sdxl.is_xl(config) else OUTER_SCALE
    if autoencoder is not None and _unsayable(autoencoder, to, outer if "unet" in states else 0):
        found["autoencoder"] = fold(found["autoencoder"], autoencoder, outer)
        autoencoder = replace(autoencoder, shift=(0.0,), scale=(outer,))
        remarks.append("the latent's own shift and scale are folded into the autoencoder's 1x1 convolutions")
    towers = dict(config.towers)
    for name in towers:
        towers[name], found[name], told = _tower(towers[name], found[name], to, sdxl.is_xl(config))
        remarks += [remark for remark in told if remark not in remarks]
    if to == "diffusers" and config.drawing not in (DrawingConfig(), LCM):
        how = config.drawing
        told_how = f"at cfg {how.cfg:g} in {how.steps} steps of {how.sampler}"
        remarks.append(f"that it is meant to be drawn {told_how} has no place there; say so when drawing")
    return replace(config, autoencoder=autoencoder, **towers), found, remarks


def _tower(
    text: TextConfig, given: Mapping[str, Tensor], to: str, xl: bool
) -> tuple[TextConfig, Mapping[str, Tensor], list[str]]:
    """`prepare` of one text tower; those of an `xl` model keep the block and the projection that others do not use."""
    state, remarks = dict(given), list[str]()
    if text.token_ids:
        state["token_embedding.weight"] = _all_rows(state["token_embedding.weight"], text.token_ids)
        text = replace(text, token_ids=(), vocabulary=VOCABULARY)
        remarks.append(f"the token table is written with all {VOCABULARY:,} rows, those of unknown tokens alike")
    hugging_face = to == "diffusers" or original_file.in_hugging_face_names(text, state)
    if (text.cleaning == "plain") != hugging_face:
        how = "does not resolve" if hugging_face else "resolves"
        remarks.append(f"what reads this layout {how} mojibake and HTML entities (&amp;) in prompts, unlike this model")
    if to == "diffusers" and not xl:
        if text.layer == "penultimate":
            last = f"transformer.resblocks.{text.layers - 1}."
            state = {key: value for key, value in state.items() if not key.startswith(last)}
            text = replace(text, layer="last", layers=text.layers - 1)
            remarks.append("the text tower's last block, which is not used, is left out")
        if state.pop("text_projection", None) is not None:
            remarks.append("the text tower's projection, which drawing does not use, is left out")
        text = replace(text, embed_dim=0)
    return text, state, remarks


def fold(state: Mapping[str, Tensor], config: AutoencoderConfig, outer: float = OUTER_SCALE) -> dict[str, Tensor]:
    """The autoencoder that, with shift 0 and scale `outer`, does what that of `config` does with its own.

    Its latent is (z - shift) r with r = scale / outer. Both ends are affine in it: the mean's row c of the last
    convolution of the encoder is shifted and scaled, its log-variance gets 2 ln r_c, and the first convolution of the
    decoder undoes it. Computed in float64, rounded once.
    """
    channels = config.latent_channels
    shift, scale = (
        torch.tensor(values, dtype=torch.float64).expand(channels) for values in (config.shift, config.scale)
    )
    ratio = scale / outer
    weight, bias = (state[f"to_moments.{name}"].double() for name in ("weight", "bias"))
    mean, logvar = weight.chunk(2)
    mean_bias, logvar_bias = bias.chunk(2)
    inward, inward_bias = (state[f"from_latent.{name}"].double() for name in ("weight", "bias"))
    made = {
        "to_moments.weight": torch.cat([mean * ratio[:, None, None, None], logvar]),
        "to_moments.bias": torch.cat([(mean_bias - shift) * ratio, logvar_bias + 2 * ratio.log()]),
        "from_latent.weight": inward / ratio[None, :, None, None],
        "from_latent.bias": inward_bias + inward[:, :, 0, 0] @ shift,
    }
    return dict(state) | {name: value.to(state[name].dtype) for name, value in made.items()}


def _unsayable(config: AutoencoderConfig, to: str, outer: float) -> bool:
    """Whether format `to` has no word for shift and scale, or one that its readers pass over: the original layout's
    take any whole model's scale for `outer` (0: no whole one), and no pipeline of diffusers' Stable Diffusion looks at
    a shift.
    """
    if not config.latent_convs:  # of Stable Diffusion 3's kind, which does have them
        return False
    other = to == "original" and outer and config.scale[0] != outer
    return len(set(config.scale)) > 1 or any(config.shift) or bool(other)


def write_diffusers(path: Path, config: ModelConfig, states: States) -> None:
    """Write the directory; a whole model's opens with the pipeline of its kind, an autoencoder's with AutoencoderKL."""
    if set(states) == {"autoencoder"}:
        assert config.autoencoder is not None
        _write_autoencoder(path, config.autoencoder, states["autoencoder"])
        return
    assert isinstance(config.unet, UNetConfig) and config.autoencoder and config.text
    _write_autoencoder(path / "vae", config.autoencoder, states["autoencoder"])
    side = config.image_size // config.autoencoder.factor
    xl = sdxl.is_xl(config)
    names = diffusers.unet_names(states["unet"])
    plain = written.write_unet(config.unet, side, config.encoder.sizes)
    _network(path / "unet", plain, exported(states["unet"], names), "unet")
    schedule = config.schedule or ScheduleConfig()
    if schedule.kind == "edm":
        scheduler = edm.write_scheduler(config)
    else:
        scheduler = written.write_scheduler(schedule, config.parameterization, config.drawing.sampler == "lcm")
    _json(path / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": _pipeline(config),
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "feature_extractor": [None, None],
    }
    for name, tower in config.towers.items():
        end = "_2" if xl and tower.embed_dim else ""  # the refiner's only tower is its second
        index |= {f"text_encoder{end}": _write_tower(path, end, tower, states[name])}
        index |= {f"tokenizer{end}": ["transformers", "CLIPTokenizer"]}
    if xl:
        index |= {"image_encoder": [None, None], "force_zeros_for_empty_prompt": config.encoder.empty == "zeros"}
        index |= {"requires_aesthetics_score": True} if config.encoder.score else {}
        _json(path / "model_index.json", index)
        return
    if extra_channels(config) == DEPTH:
        index["depth_estimator"] = [None, None]
    else:
        index |= {"safety_checker": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}
    _json(path / "model_index.json", index)


def _pipeline(config: ModelConfig) -> str:
    """The class that opens it; XL's inpaints by any network, and its refiner begins with a picture."""
    if not sdxl.is_xl(config):
        lcm = config.told_guidance and config.drawing.sampler == "lcm" and not extra_channels(config)
        return f"{diffusers.LATENT_CONSISTENCY}Pipeline" if lcm else PIPELINES[extra_channels(config)]
    if extra_channels(config) == MASK:
        return "StableDiffusionXLInpaintPipeline"
    return "StableDiffusionXLImg2ImgPipeline" if config.encoder.score else "StableDiffusionXLPipeline"


def _write_tower(path: Path, end: str, config: TextConfig, state: Mapping[str, Tensor]) -> list[str]:
    """A text tower and its tokenizer; what model_index.json says of it."""
    projection = diffusers.PROJECTION if config.embed_dim else ""
    tensors = exported(state, diffusers.clip_names(state, projection=projection))
    if projection:
        tensors[projection] = tensors[projection].T.contiguous()  # a linear layer there
    plain = written.write_text(config)
    _network(path / f"text_encoder{end}", plain, tensors, "text_encoder")
    write_tokenizer(path / f"tokenizer{end}", config)
    return ["transformers", plain["architectures"][0]]


def _write_autoencoder(folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor]) -> None:
    (groups,) = groups_of(config)
    tensors = exported(state, diffusers.autoencoder_names(state))
    attention = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    tensors = {n: v.flatten(1) if n.endswith(attention) else v for n, v in tensors.items()}  # linear layers there
    _network(folder, written.write_autoencoder(config, groups), tensors, "vae")


def _network(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], kind: str) -> None:
    with atomic_write(folder / f"{diffusers.WEIGHTS[kind]}.safetensors") as temporary:
        write_tensors(tensors, temporary, {"format": "pt"})
    _json(folder / "config.json", config)


def _json(path: Path, plain: Mapping[str, object]) -> None:
    atomic_write_text(path, json.dumps(plain, indent=2) + "\n")


def _all_rows(table: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """(VOCABULARY, D) of a table in which the i-th of `token_ids` has row i and all others share the last."""
    rows = torch.full((VOCABULARY,), len(token_ids))
    rows[list(token_ids)] = torch.arange(len(token_ids))
    return table[rows]
