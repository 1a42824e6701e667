"""A name or path -> the Model that lies there, opened and put together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import MemoryNotice, UserError
from ldm.find import find
from ldm.model import Model, assemble

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.record import Checkpoint

ROOM = 0.8  # of the memory that is free, for T5 and the network together


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
        if backend in ("graph", "fused", "openvino"):
            raise UserError(
                f"the backend '{backend}' needs networks that stay where they are, and low_memory moves them; leave "
                "one of the two out"
            )
        where, backend = choose_device("cpu"), "torch" if backend == "auto" else backend
    codec = checkpoint.load("autoencoder", where, dtype)
    towers = checkpoint.load_towers(where, dtype, rest=low_memory or _too_large(checkpoint, where, dtype))
    unet = checkpoint.load("unet", where, dtype)
    unet.set_attention_backend(attention)
    for network in (codec.autoencoder, *(towers[name] for name in checkpoint.config.towers), unet):
        if network is not None:  # T5 is run as it is: twice for a picture, and there is too much of it to reorder
            backends.run_by(backend, network, main=network is unet)
    made = assemble(checkpoint.config, codec, towers, unet, name=str(model), path=path)
    named = None if vae is None else str(vae)
    made = replace(made, checkpoint=checkpoint, vae=named, settings=dict(settings or {}), backend=backend)
    return replace(made, works_on=works_on)


def _too_large(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether T5 does not fit beside the network, and is read layer by layer; a MemoryNotice says so."""
    from ldm.device import free_memory

    if checkpoint.config.t5 is None or "t5" not in checkpoint.parts or "unet" not in checkpoint.parts:
        return False
    t5, unet = (
        dtype.itemsize * sum(math.prod(state.form(key)[1]) for key in state)
        for state in (checkpoint.state("t5"), checkpoint.state("unet"))
    )
    free = free_memory(device)
    if free is None or t5 + unet <= ROOM * free:
        return False
    warnings.warn(
        f"T5 takes {t5 / 1e9:.1f} GB beside the network's {unet / 1e9:.1f}, and {free / 1e9:.1f} GB are free, so its "
        "layers are read from the file one by one while it runs; --precision bf16 halves it, and --set t5=null leaves "
        "it out",
        MemoryNotice,
        stacklevel=4,
    )
    return True
