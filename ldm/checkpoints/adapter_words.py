"""What the file of a LoRA or a word says of itself in its metadata, in the keys that its common readers show: kohya's
(`ss_`, which AUTOMATIC1111 lists) and Stability's `modelspec.`; and whether it was made for the model at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoints.architectures import name_of
from ldm.config import DiffusionTraining, DrawingConfig, EmbeddingTraining, ModelConfig
from ldm.errors import explain_os_error
from ldm.jobs.adapters import read_hash
from ldm.plain import parse_json
from ldm.settings import from_dict, to_dict

if TYPE_CHECKING:
    from ldm.checkpoints.record import Checkpoint

BASE = "ldm.base_hash"  # Checkpoint.base_hash
DRAWING = "ldm.drawing"  # a DrawingConfig
_HASHES = (BASE, "ss_new_sd_model_hash", "ss_sd_model_hash", "sd_checkpoint")  # ours, kohya's two, AUTOMATIC1111's
_PREDICTIONS = {"eps": "epsilon"}


def training_words(
    kind: str,
    config: DiffusionTraining | EmbeddingTraining,
    base: Checkpoint,
    finished: bool,
    drawing: DrawingConfig | None = None,
) -> dict[str, str]:
    """The metadata of a "lora" or a "textual-inversion" that the training `config` made of the model `base`.

    `drawing`: how a model with it is meant to be drawn, where that is not as without it."""
    side, title = config.data.size, Path(config.output).name or kind
    optimizer, loop, loss = config.optimizer, config.loop, config.loss
    version, architecture = _version(base.config)
    target = base.config.parameterization
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": _PREDICTIONS.get(target, target),
        "ss_output_name": title,
        "ss_sd_model_name": base.path.name,
        "ss_new_sd_model_hash": _file_hash(base.path) if base.path.is_file() else base.base_hash,
        BASE: base.base_hash,
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_resolution": f"({side}, {side})",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_learning_rate": f"{optimizer.rate:g}",
        "ss_lr_scheduler": optimizer.law,
        "ss_lr_warmup_steps": str(optimizer.warmup),
        "ss_max_grad_norm": f"{optimizer.clip:g}",
        "ss_max_train_steps": str(loop.steps),
        "ss_total_batch_size": str(loop.global_batch),
        "ss_seed": str(loop.seed),
        "ss_noise_offset": f"{loss.offset_noise:g}",
        "ss_caption_dropout_rate": f"{loss.caption_dropout:g}",
    }
    if loss.weight == "min_snr":
        said["ss_min_snr_gamma"] = f"{loss.min_snr_gamma:g}"
    if drawing is not None:
        said[DRAWING] = json.dumps(to_dict(drawing))
    return said | ({"ss_steps": str(loop.steps)} if finished else {})


def drawing_in(metadata: Mapping[str, str], path: str) -> DrawingConfig | None:
    """How a model with the adapter at `path` is meant to be drawn, if its metadata say so. Raises UserError."""
    where = f"{DRAWING} of {path}"
    return from_dict(DrawingConfig, parse_json(metadata[DRAWING], where), where) if DRAWING in metadata else None


def other_base(metadata: Mapping[str, str], base: Checkpoint) -> str:
    """What an adapter's metadata says that it was made for, if that is not `base`; "" if it is, or nothing is said."""
    word = next((str(metadata[key]) for key in _HASHES if _is_hash(str(metadata.get(key, "")))), "").lower()
    same = base.base_hash == word if BASE in metadata else _file_has(base.path, word)
    if same or not word:
        return ""
    name = str(metadata.get("ss_sd_model_name") or metadata.get("sd_checkpoint_name") or "another model")
    return f"{''.join(filter(str.isprintable, name))[:100]}, {word[:10]}"


_file_hash = cache(read_hash)  # of a training's base, at each of its exports


def _file_has(path: Path, word: str) -> bool:
    """Whether the file at `path` has that hash: sha256 or its beginning, or the short one of AUTOMATIC1111's youth."""
    if not word or not path.is_file():
        return False
    if len(word) == 8:
        try:
            with open(path, "rb") as file:
                file.seek(0x100000)
                if hashlib.sha256(file.read(0x10000)).hexdigest()[:8] == word:
                    return True
        except OSError as error:
            raise explain_os_error(error, f"reading {path}") from error
    return read_hash(path).startswith(word)


def _is_hash(word: str) -> bool:
    return 8 <= len(word) <= 64 and all(letter in "0123456789abcdefABCDEF" for letter in word)


def _version(config: ModelConfig) -> tuple[str, str]:
    """kohya's name of the base, and Stability's."""
    names = [name_of(replace(config, parameterization=kind)) for kind in ("eps", "v")]
    v = config.parameterization == "v"
    if any(name.startswith("Stable Diffusion v1") for name in names):
        return "sd_v1", "stable-diffusion-v1"
    if any(name.startswith("Stable Diffusion v2") for name in names):
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if v else ("sd_v2", "stable-diffusion-v2-512")
    if "Stable Diffusion XL" in names:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    return "ldm", "latent-diffusion"
