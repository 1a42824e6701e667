"""Adapters on a model: read, merged, and written down in the new model's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.adapters.lora import Lora, merged
from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.backends import run_by
from ldm.checkpoints.adapter_words import drawing_in, other_base
from ldm.checkpoints.lora import read_lora
from ldm.checkpoints.reading import read_metadata
from ldm.checkpoints.textual_inversion import read_bundled, read_embeddings
from ldm.errors import UserError
from ldm.jobs.adapters import Adapter, read_hash

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import Model

M = TypeVar("M", bound="Model")


def apply(model: M, adapters: Sequence[Adapter]) -> M:
    """`model` with `adapters` too. `model` stays as it is: the new one shares with it all tensors that no LoRA changes.

    Its notices say which words were loaded, and which files were made for another model. Raises UserError for files
    that cannot be read or do not fit.
    """
    opened = [replace(adapter, hash=read_hash(adapter.file)) for adapter in adapters]
    loras: list[tuple[Lora, float]] = []
    words: list[Embedding] = []
    told: list[str] = []
    config = model.config
    for adapter in opened:
        metadata = read_metadata(adapter.file)
        if (drawing := drawing_in(metadata, adapter.path)) is not None:
            config = replace(config, drawing=drawing)
            told.append(
                f"with {adapter.path} pictures are drawn at cfg {drawing.cfg:g} in {drawing.steps} steps of "
                f"{drawing.sampler}, where nothing else is said"
            )
        if adapter.kind == "lora":
            loras.append((read_lora(adapter.file, model.unet, model.towers), adapter.scale))
            words += read_bundled(adapter.file)
        else:
            words += read_embeddings(adapter.file)
        base = other_base(metadata, model.checkpoint) if model.checkpoint is not None else ""
        if base:
            told.append(
                f"{adapter.path} says that it was made for another model ({base}) than {model.name or 'this'}; what it "
                "does here may differ from what it does there"
            )
    for word in words:
        vectors = f"{len(word.vectors)} vector{'s' if len(word.vectors) > 1 else ''}"
        other = "; it has others for a second text tower" if word.second is not None and len(model.towers) == 1 else ""
        told.append(f"{word.source} brings the word '{word.word}', {vectors}{word.remark}{other}")
    if words and model.text is None:
        raise UserError("a word goes into a text tower, and this model has none; leave the embedding out")
    own = {"unet": model.unet, **model.towers}
    networks: dict[str, Any] = merged(own, loras)
    if networks["unet"] is not model.unet:
        run_by(model.backend, networks["unet"], main=True)
    read = [_vectors(word, {name: tower.config.width for name, tower in model.towers.items()}) for word in words]
    for name in model.towers if words else ():
        networks[name] = TowerWithWords(networks[name], _only(words, read, name)).eval()
    for word, of in zip(words, read, strict=True):
        if len(of) < len(model.towers):
            told.append(
                f"{word.source} has vectors for one text tower alone; the other reads '{word.word}' as it stands"
            )
    encoder = model.encoder.with_towers({name: networks[name] for name in model.towers})
    adapters = (*model.adapters, *opened)
    made = {"config": config, "unet": networks["unet"], "encoder": encoder, "adapters": adapters}
    return replace(model, **made, told=(*model.told, *told))


def _vectors(word: Embedding, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Text tower -> the vectors that it reads the word as. What a file has for the second tower alone goes there."""
    sets = [vectors for vectors in (word.vectors, word.second) if vectors is not None]
    if len(widths) == 1:
        return {
            name: next((each for each in sets if each.shape[-1] == width), sets[0]) for name, width in widths.items()
        }
    first, second, *_ = widths
    if word.second is not None:
        return {first: word.vectors, second: word.second}
    fitting = [name for name, width in widths.items() if word.vectors.shape[-1] == width]
    return {name: word.vectors for name in fitting[:1] or [first]}  # the latter is refused, by its width


def _only(words: Sequence[Embedding], read: Sequence[Mapping[str, Tensor]], name: str) -> list[Embedding]:
    """The words that have vectors for one tower, with those."""
    return [replace(word, vectors=of[name]) for word, of in zip(words, read, strict=True) if name in of]
