"""A name or path -> the Model that lies there, opened and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.find import find
from ldm.model import Model, assemble


def load_model(
    model: str | Path = "icons",
    device: str = "auto",
    precision: str = "auto",
    *,
    vae: str | Path | None = None,
    weights: str = "auto",
    settings: Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    backend: str = "auto",
    low_memory: bool = False,
) -> Model:
    """The record of what `api.load` opens, which has the arguments' meaning. Raises UserError."""
    from ldm import backends
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.device import choose_device, choose_precision
    from ldm.unet.attention import check_backend

    backends.check(backend)
    path = find(model)
    other = None if vae is None else find(vae)
    where = choose_device(device)
    dtype = choose_precision(precision, where)
    check_backend(attention, where.type)
    checkpoint = open_checkpoint(path, weights, settings, other)
    works_on = where if low_memory else None
    if low_memory and where.type != "cpu":
        where, backend = choose_device("cpu"), "torch" if backend == "auto" else backend
    codec = checkpoint.load("autoencoder", where, dtype)
    towers = checkpoint.load_towers(where, dtype)
    unet = checkpoint.load("unet", where, dtype)
    unet.set_attention_backend(attention)
    for network in (codec.autoencoder, *towers.values(), unet):
        if network is not None:
            backends.run_by(backend, network, main=network is unet)
    made = assemble(checkpoint.config, codec, towers, unet, name=str(model), path=path)
    named = None if vae is None else str(vae)
    made = replace(made, checkpoint=checkpoint, vae=named, settings=dict(settings or {}), backend=backend)
    return replace(made, works_on=works_on)
