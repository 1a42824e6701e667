"""Adapters on a model: read, merged, and written down in the model's record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.adapters.lora import Loras
from ldm.adapters.record import Adapter, read_hash
from ldm.adapters.textual_inversion import TowerWithWords
from ldm.checkpoints.lora import read_lora
from ldm.checkpoints.textual_inversion import read_embeddings

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


def apply(model: LatentDiffusion, adapters: Sequence[Adapter]) -> tuple[LatentDiffusion, Loras]:
    """`model` with `adapters`, in order, and the LoRAs among them, by which they can be taken out again (`clear`).

    The LoRAs go into the weights of `model`'s own networks; words live in the text tower of the returned model alone.
    Raises UserError, with the weights as they were, for files that cannot be read or were made for another model.
    """
    loras = Loras({"unet": model.unet, "text": model.text})
    read = [replace(adapter, hash=read_hash(adapter.path)) for adapter in adapters]
    words = [word for adapter in read if adapter.kind == "embedding" for word in read_embeddings(adapter.path)]
    text = TowerWithWords(model.text, words).eval() if words else model.text
    try:
        for adapter in read:
            if adapter.kind == "lora":
                loras.add(read_lora(adapter.path, model.unet, model.text), adapter.scale)
    except BaseException:
        loras.clear()
        raise
    return replace(model, text=text, adapters=(*model.adapters, *read)), loras
