"""Files of textual inversion, in everybody's layouts; one file may hold several words.

diffusers            "<cat>": (n, D) or (D,)                      the key is the word
AUTOMATIC1111 .pt    "string_to_param": {"*": (n, D)}, "name"     the file's name is the word, whatever it is inside
AUTOMATIC1111        "emb_params"    OneTrainer "emp_params"      the same
SD XL's, ComfyUI     "clip_l", "clip_g"                           the same, for each of two towers
in a LoRA's file     "bundle_emb.WORD.clip_l"                     OneTrainer's words that were trained along with it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.adapters.textual_inversion import Embedding
from ldm.checkpoints.adapter_words import BASE
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.state import some
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write

MAX_VECTORS = 1024  # of one word; a prompt has room for 75
MAX_LETTERS = 200  # of one word
WORD = "modelspec.trigger_phrase"  # in our files' metadata
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\.)?(\*|[^.]+)")
CONTAINERS = ("emb_params", "emp_params", "clip_l", "clip_h", "*", "clip_g", "t5", "t5xxl")
"""Keys that say where vectors go or that they are some, and no word; the first of them that is there is taken."""

FIRST, SECOND = "clip_l", "clip_g"
"""SECOND beside another of them is for a model's second tower."""

_OUTPUTS = tuple(f"{key}_out" for key in CONTAINERS)  # OneTrainer's, added to what the tower gives
_NO_WORD = re.compile(r"\W*|\d+|embs?|embeddings?|vec|vectors?|weights?|params?|tensors?|data", re.IGNORECASE)
_NETWORK = re.compile(r"\.(weight|bias|alpha|diff|diff_b|dora_scale|(hada|lokr)_\w+)$")


def read_embeddings(path: str | Path) -> list[Embedding]:
    """The words in the file at `path`; raises UserError if it is no such file."""
    path = Path(path)
    tensors = read_tensors(path)
    if found := _bundled(tensors, path):
        beside = len(tensors) > sum(BUNDLED.fullmatch(name) is not None for name in tensors)
        remark = "; the LoRA in the same file has to be named as one" if beside else ""
        return [replace(word, remark=f"{word.remark}{remark}") for word in found]
    params = {name.removeprefix("string_to_param."): name for name in tensors if name.startswith("string_to_param.")}
    keys = params or {name: name for name in tensors if not name.startswith("string_to_token")}
    own = tensors.metadata.get(WORD)  # of a file of ours, whatever its word looks like
    outputs = [key for key in keys if key in _OUTPUTS]
    vectors = [key for key in keys if key in CONTAINERS and key != own]
    if len(keys) == 1 and not outputs and own not in keys and (params or not _is_word(*keys)):
        vectors = list(keys)  # all readers take a single key for vectors, whatever it is called
    words = [key for key in keys if key not in vectors and key not in outputs]
    strange = [key for key in words if key != own and not _is_word(key)]
    if strange or not (words or vectors) or (outputs and not vectors):
        raise UserError(f"{path} is no file of textual inversion: {_what_instead(keys, strange or outputs)}")
    for key in words:
        found.append(Embedding(key, _vectors(tensors, keys[key], path), str(path)))
    if vectors:
        first = min(vectors, key=lambda key: CONTAINERS.index(key) if key in CONTAINERS else 0)
        word = own if own and BASE in tensors.metadata else re.sub(r"\s+", "_", path.stem)  # no white space in it
        inside = "".join(filter(str.isprintable, tensors.metadata.get("name", word))) if params else word
        remark = f"; inside it is called '{inside[:100]}', which means nothing here" if inside != word else ""
        second = SECOND if SECOND in vectors and first != SECOND else ""
        remark += _passed((*vectors, *outputs), first, second)
        other = _vectors(tensors, keys[second], path) if second else None
        found.append(Embedding(word, _vectors(tensors, keys[first], path), str(path), remark, other))
    return found


def read_bundled(path: str | Path) -> list[Embedding]:
    """The words that a LoRA's file brings along; mostly none. Raises UserError for a damaged file."""
    return _bundled(read_tensors(path), Path(path))


def save_embedding(path: str | Path, embedding: Embedding, words: Mapping[str, str] | None = None) -> None:
    """Write a word as a .safetensors file, in diffusers' layout or, for two towers, in that of Stable Diffusion XL's;
    `words` go into its metadata (adapter_words.py).

    Raises UserError if the disk does not take it.
    """
    metadata = {"format": "pt", WORD: embedding.word, **(words or {})}
    with atomic_write(path) as temporary:
        found = {embedding.word: embedding.vectors}
        if embedding.second is not None:
            found = {FIRST: embedding.vectors, SECOND: embedding.second}
        write_tensors({key: value.to("cpu", torch.float32) for key, value in found.items()}, temporary, metadata)


def _bundled(tensors: Tensors, path: Path) -> list[Embedding]:
    keys: dict[str, dict[str, str]] = {}
    for name in tensors:
        if found := BUNDLED.fullmatch(name):
            keys.setdefault(found[1], {})[found[2]] = name
    words = []
    for word, names in keys.items():
        first = next((key for key in CONTAINERS if key in names), None)
        if first is None:
            raise UserError(f"{path} brings the word '{word[:100]}' as {some(list(names))}, which is not supported")
        second = SECOND if SECOND in names and first != SECOND else ""
        other = _vectors(tensors, names[second], path) if second else None
        own = _vectors(tensors, names[first], path)
        words.append(Embedding(word, own, str(path), _passed(names, first, second), other))
    return words


def _passed(keys: Iterable[str], *taken: str) -> str:
    others = [key[:60] for key in keys if key not in taken]
    return f"; passed over: {some(others)}" if others else ""


def _vectors(tensors: Tensors, name: str, path: Path) -> Tensor:
    """(n, D)"""
    vectors = tensors[name]
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim == 2 and not 0 < len(vectors) <= MAX_VECTORS:
        raise UserError(f"{path}: {name[:100]} is {len(vectors)} vectors; a word has between 1 and {MAX_VECTORS}")
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise UserError(f"{path} is no file of textual inversion: {name[:100]} is not a list of vectors")
    return vectors


def _is_word(key: str) -> bool:
    """Whether a key may be what a prompt says."""
    plain = key.isprintable() and not re.search(r"\s", key) and len(key) <= MAX_LETTERS
    return plain and key not in CONTAINERS and not _NETWORK.search(key) and not _NO_WORD.fullmatch(key)


def _what_instead(keys: Iterable[str], strange: list[str]) -> str:
    if strange and strange[0] in _OUTPUTS:
        return f"{some(strange)} is added to what the text tower gives, which is not supported"
    names = some([key[:60] for key in strange], 3) or "no tensors"
    hint = "; it looks like a LoRA" if any(_NETWORK.search(key) for key in keys) else ""
    return f"it has neither a word nor A1111's emb_params, but {names}{hint}"
