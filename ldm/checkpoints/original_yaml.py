"""The YAML that lies beside an original file: the settings of the script that trained it, or of the one that draws.

Two dialects: CompVis' and v2's own (model.params.parameterization, linear_start, unet_config, cond_stage_config), and
that of their successor (denoiser_config, network_config, conditioner_config), which is told in the words of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints.said import ZERO_SNR, Said, text_layer
from ldm.errors import UserError
from ldm.model_config import ModelConfig, ScheduleConfig, TextConfig
from ldm.plain import read_yaml_text

BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # their names -> ours
PREDICTIONS = {"eps": "eps", "x0": "x0", "v": "v"}
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}  # of the successor's denoiser
LAYERS = {"FrozenCLIPEmbedder": ("last",), "FrozenOpenCLIPEmbedder": ("last", "penultimate")}


def read_yaml(path: Path, config: ModelConfig) -> tuple[list[Said], tuple[str, ...]]:
    """What the YAML says of a model whose shapes are `config`, and remarks; raises UserError if it cannot be read."""
    import yaml

    model = _dict(_dict(_dict(yaml.safe_load(read_yaml_text(path))).get("model")).get("params"))
    if not model:
        return [], (f"{path} says nothing of a model (it has no model.params) and is passed over",)
    model = _translated(model)
    found: list[Said] = []

    def say(key: str, value: Any, words: str) -> None:
        found.append(Said(key, value, f"{path} with {words}"))

    try:
        if config.unet is not None:
            word = str(model.get("parameterization", "eps"))
            say("parameterization", PREDICTIONS.get(word), f"parameterization {word[:60]}")
            say("schedule", *_schedule(model))
            for name in ("rescale_betas_zero_snr", "zero_terminal_snr", "ztsnr"):
                if model.get(name) is not None:
                    say(ZERO_SNR, bool(model[name]), name)
            unet = _dict(_dict(model.get("unet_config")).get("params"))
            if "num_heads" in unet or "num_head_channels" in unet:
                width = int(unet.get("num_head_channels", -1))
                say("unet.heads", 0 if width > 0 else int(unet["num_heads"]), "num_heads")
                say("unet.head_width", max(width, 0), "num_head_channels")
        if config.autoencoder is not None and "scale_factor" in model:
            say("autoencoder.scale", (float(model["scale_factor"]),), "scale_factor")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} has a setting that is not read here ({error}); correct or remove the file") from error
    stage = _dict(model.get("cond_stage_config"))
    if config.text is not None and stage.get("target"):
        found += _text(stage, config.text, path)
    return found, ()


def _schedule(model: Mapping[str, Any]) -> tuple[ScheduleConfig | None, str]:
    """The schedule, None for one that our settings have no word for, and the words that say so."""
    kind = str(model.get("beta_schedule", "linear"))
    words = f"beta_schedule {kind[:60]}"
    if kind not in BETAS:
        return None, words
    for name, usual in (("given_betas", None), *([("cosine_s", 8e-3)] if kind == "cosine" else [])):
        if model.get(name, usual) != usual:
            return None, f"{words}, {name}"
    start, end = float(model.get("linear_start", 1e-4)), float(model.get("linear_end", 2e-2))
    return ScheduleConfig(BETAS[kind], int(model.get("timesteps", 1000)), start, end), words


def _text(stage: Mapping[str, Any], text: TextConfig, path: Path) -> list[Said]:
    """The text encoder's class tells the activation and the padding; its layer may be said."""
    kind, settings = str(stage["target"]).rpartition(".")[2][:60], _dict(stage.get("params"))
    open_clip = text.cleaning == "open_clip"  # in whose names the tensors are
    layer = str(settings.get("layer", "last"))[:60]
    where = f"{path} with {kind}, layer {layer}"
    if kind != ("FrozenOpenCLIPEmbedder" if open_clip else "FrozenCLIPEmbedder"):
        return [Said("text.layer", None, f"{where}, where the tensors are {'OpenCLIP' if open_clip else 'CLIP'}'s")]
    found = [
        Said("text.layer", text_layer(layer, text) if layer in LAYERS[kind] else None, where),
        Said("text.padding", "zero" if open_clip else "eot", where),
    ]
    name = str(settings.get("arch" if open_clip else "version", "")).lower()
    if open_clip or not name or "openai" in name or "clip-vit-large-patch14" in name:
        found.append(Said("text.quick_gelu", not open_clip or name.endswith("quickgelu"), where))
    return found


def _translated(model: dict[str, Any]) -> dict[str, Any]:
    """The successor's words in those of CompVis; what it says beside them of its law is kept as a word none knows."""
    if "denoiser_config" not in model:
        return model
    denoiser = _dict(model["denoiser_config"])
    inner = _dict(denoiser.get("params"))
    scaling, spacing = (_dict(inner.get(name)) for name in ("scaling_config", "discretization_config"))
    kinds = [str(part.get("target", "")).rpartition(".")[2] for part in (denoiser, scaling, spacing)]
    known = kinds[0] == "DiscreteDenoiser" and kinds[2] == "LegacyDDPMDiscretization" and kinds[1] in SCALINGS
    ends = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000} | _dict(spacing.get("params"))
    towers = _dict(_dict(model.get("conditioner_config")).get("params")).get("emb_models")
    return model | {
        "parameterization": SCALINGS[kinds[1]] if known else " over ".join(kinds),
        "linear_start": ends["linear_start"],
        "linear_end": ends["linear_end"],
        "timesteps": ends["num_timesteps"],
        "unet_config": model.get("network_config"),
        "cond_stage_config": towers[0] if isinstance(towers, list) and len(towers) == 1 else None,
    }


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
