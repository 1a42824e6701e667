"""Spaces that pictures and captions share: how well a picture fits its caption is their cosine.

Either our own CLIP (both towers as scripts/train_clip.py leaves them: the shipped model has the text tower only), or
an architecture of open_clip with a checkpoint file. The weights' hash is part of a space's name, since "CLIP score"
alone says nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.image_tower import load_image_tower
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError, explain_os_error, first_line
from ldm.find import find
from ldm.metrics.features import FeatureSpace, resized


def own_clip(folder: str, device: str = "cpu") -> FeatureSpace:
    """The joint space of the towers in `folder`. Raises UserError where one is missing."""
    if not folder:
        raise UserError("name the folder of a CLIP with both towers, as clip=runs/clip; scripts/train_clip.py makes it")
    path = find(folder)
    text = open_checkpoint(path).load("text", device)
    tower = load_image_tower(path)
    digest = hashlib.sha256((native.fingerprint(text) + native.fingerprint(tower)).encode()).hexdigest()
    tower = tower.to(device)
    side = tower.config.size

    def features(image: Tensor) -> Tensor:
        return tower(resized(image, side))

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
        return torch.cat([text.features(text.tokenize(part)[0].to(device)).float().cpu() for part in parts])

    return FeatureSpace(
        f"clip-{digest[:8]}",
        tower.embed_dim,
        features,
        text=texts,
        hash=digest,
        resize=f"{side} px, bicubic, antialiased, float",
        note="a model whose contexts come from the same text tower is judged by its own teacher",
        device=device,
    )


def open_clip_space(name: str, file: str, device: str = "cpu") -> FeatureSpace:
    """The joint space of an open_clip architecture with the weights in `file`; nothing is downloaded.

    `name`: the architecture, as ViT-L-14-336-quickgelu, and behind a colon, where it is needed, the name under which
    open_clip knows the weights. Mean, deviation and filter are those that open_clip has for them; the activation is the
    architecture's. Raises UserError for an unknown architecture, where it is not known how the weights take pictures,
    and for weights that are missing or do not fit.
    """
    architecture, _, tag = name.partition(":")
    declare_missing_operators()
    import open_clip

    if architecture not in open_clip.list_models():
        raise UserError(f"there is no feature space '{architecture}', and no open_clip architecture of that name")
    taken = _preparation(architecture, tag)
    try:
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise explain_os_error(error, f"reading the weights {file}") from error
    model: Any = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, device=device)
    try:
        open_clip.load_checkpoint(model, file, weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(f"{file} holds no weights of {architecture} ({first_line(error)})") from error
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(architecture)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (taken.mean, taken.std))

    def features(image: Tensor) -> Tensor:
        return model.encode_image(((resized(image, side, taken.filter) + 1) / 2 - mean) / std)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        parts = [list(captions[i : i + 64]) for i in range(0, len(captions), 64)]
        return torch.cat([model.encode_text(tokenizer(part).to(device)).float().cpu() for part in parts])

    with torch.no_grad():
        width = texts(["a"]).shape[1]
    how = f"{side} px, {taken.filter}, antialiased, float; mean {_told(taken.mean)}, deviation {_told(taken.std)}"
    return FeatureSpace(f"{architecture}-{digest[:8]}", width, features, 0, texts, digest, how, device=device)


@dataclass(frozen=True)
class Preparation:
    """How weights take pictures in [0, 1]. Ours are squares, so it does not matter how others would be cut."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str  # of resizing


def _preparation(architecture: str, tag: str) -> Preparation:
    """What open_clip has for the published weights of an architecture, or of one `tag`. Raises UserError."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.transform import PreprocessCfg

    quick = bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))
    published = {name: get_pretrained_cfg(architecture, name) for name in list_pretrained_tags_by_model(architecture)}
    if tag and tag not in published:
        raise UserError(
            f"open_clip knows no weights '{tag}' of {architecture}; choose from {', '.join(published) or 'none'}"
        )
    meant = {name: known for name, known in published.items() if name == (tag or name)}
    fitting = {name: known for name, known in meant.items() if bool(known.get("quick_gelu")) == quick}
    if meant and not fitting:
        other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
        raise UserError(
            f"the weights '{tag or ', '.join(meant)}' have another activation; take the architecture {other}"
        )
    usual = PreprocessCfg()
    ways = {
        Preparation(
            tuple(known.get("mean", usual.mean)),
            tuple(known.get("std", usual.std)),
            known.get("interpolation", usual.interpolation),
        )
        for known in fitting.values()
    }
    if not ways:
        raise UserError(
            f"open_clip has no published weights of {architecture}, so it is unknown how it prepares pictures"
        )
    if len(ways) > 1:
        raise UserError(
            f"the weights of {architecture} take pictures in {len(ways)} ways; say which the file has, as "
            f"{architecture}:{next(iter(fitting))}=FILE (of {', '.join(fitting)})"
        )
    return ways.pop()


def _told(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
