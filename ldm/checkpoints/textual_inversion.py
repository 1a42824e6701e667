"""Files of textual inversion, in their three layouts; one file may hold several words.

diffusers               "<cat>": (n, D) or (D,)                   the key is the word
AUTOMATIC1111, .pt      "string_to_param": {"*": (n, D)}, "name"  the name is the word, else the file's own
AUTOMATIC1111           "emb_params": (n, D)                      the file's name is the word
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ldm.adapters.textual_inversion import Embedding
from ldm.checkpoints.reading import read_tensors
from ldm.errors import UserError
from ldm.files import atomic_write

MAX_VECTORS = 1024  # of one word; a prompt has room for 75


def read_embeddings(path: str | Path) -> list[Embedding]:
    """The words in the file at `path`; raises UserError if it is no such file."""
    path = Path(path)
    tensors = read_tensors(path)
    found = []
    for name in tensors:
        if name == "emb_params":
            word = path.stem
        elif name.startswith("string_to_param."):
            word = tensors.metadata.get("name") or path.stem
        elif name.startswith("string_to_token") or ("." in name and not name.startswith("<")):
            continue
        else:
            word = name
        vectors = tensors[name]
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        if vectors.ndim != 2 or not vectors.is_floating_point() or len(vectors) > MAX_VECTORS:
            raise UserError(f"{path} is no file of textual inversion: {name[:100]} is not a list of vectors")
        found.append(Embedding(word, vectors, str(path)))
    if not found:
        raise UserError(f"{path} is no file of textual inversion: it has neither a word nor A1111's emb_params")
    return found


def save_embedding(path: str | Path, embedding: Embedding) -> None:
    """Write a word as a .safetensors file in diffusers' layout. Raises UserError if the disk does not take it."""
    tensors = {embedding.word: embedding.vectors.detach().to("cpu", torch.float32).contiguous()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
