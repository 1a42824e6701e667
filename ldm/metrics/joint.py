"""Spaces that pictures and captions share: how well a picture fits its caption is their cosine.

Either our own CLIP (both towers as scripts/train_clip.py leaves them: the shipped model has the text tower only), or
an architecture of open_clip with a checkpoint file. The weights' hash is part of a space's name, since "CLIP score"
alone says nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import native
from ldm.conditioning.image_tower import load_image_tower
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError, explain_os_error
from ldm.metrics.features import FeatureSpace, resized


def own_clip(folder: str, device: str = "cpu") -> FeatureSpace:
    """The joint space of the towers in `folder`. Raises UserError where one is missing."""
    if not folder:
        raise UserError("name the folder of a CLIP with both towers, as clip=runs/clip; scripts/train_clip.py makes it")
    text = native.load_text(folder, device)
    tower = load_image_tower(folder)
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


def open_clip_space(architecture: str, file: str, device: str = "cpu") -> FeatureSpace:
    """The joint space of an open_clip architecture with the weights in `file`; nothing is downloaded.

    Raises UserError for an unknown architecture and for weights that are missing or do not fit.
    """
    declare_missing_operators()
    import open_clip

    if architecture not in open_clip.list_models():
        raise UserError(f"there is no feature space '{architecture}', and no open_clip architecture of that name")
    try:
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise explain_os_error(error, f"reading the weights {file}") from error
    model: Any = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, device=device)
    try:
        open_clip.load_checkpoint(model, file, weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(f"{file} holds no weights of {architecture} ({str(error).splitlines()[0]})") from error
    model.eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(architecture)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    mean, std = (
        torch.tensor(values, device=device).reshape(1, 3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )

    def features(image: Tensor) -> Tensor:
        return model.encode_image(((resized(image, side) + 1) / 2 - mean) / std)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        parts = [list(captions[i : i + 64]) for i in range(0, len(captions), 64)]
        return torch.cat([model.encode_text(tokenizer(part).to(device)).float().cpu() for part in parts])

    with torch.no_grad():
        width = texts(["a"]).shape[1]
    how = f"{side} px, bicubic, antialiased, float; mean and deviation of OpenAI's CLIP"
    return FeatureSpace(f"{architecture}-{digest[:8]}", width, features, 0, texts, digest, how, device=device)
