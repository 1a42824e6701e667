"""The T5 of Stable Diffusion 3 in foreign files: names, what shapes and JSON tell of it, and where its tokenizer is.

    text_encoders.t5xxl.transformer.*   in a single file, or without that prefix in t5xxl_fp16.safetensors beside it
    text_encoder_3/  tokenizer_3/       in a directory of diffusers

Both in transformers' names, the table of tokens as `shared.weight`, as `encoder.embed_tokens.weight`, or as both. A
single file has no tokenizer, unless one is kept in it as bytes (`tokenizer_json`; `spiece_model`, as others do). Else
it lies beside: tokenizer.json or spiece.model in a folder tokenizer_3, or spiece.model by itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.changed import Changed, Made
from ldm.checkpoints.diffusers_configs import Plain, refuse_others, value
from ldm.checkpoints.reading import read_tensors
from ldm.checkpoints.scaled import unscaled
from ldm.checkpoints.state import Names, Source
from ldm.conditioning import t5_tokenizer
from ldm.errors import UserError, explain_os_error
from ldm.files import atomic_write_text
from ldm.model_config import T5Config
from ldm.plain import read_json

Place = tuple[Source, Callable[[Iterable[str]], Names], tuple[str, ...], str]
"""What a record.Part is made of."""

PREFIX = "text_encoders.t5xxl.transformer."
FILES = ("t5xxl_fp16", "t5xxl_bf16", "t5xxl", "t5xxl_fp8_e4m3fn_scaled", "t5xxl_fp8_e4m3fn")  # beside, the best first
TABLE, SHARED = "encoder.embed_tokens.weight", "shared.weight"
TOKENIZER, SENTENCEPIECE = "tokenizer_json", "spiece_model"  # the names of bytes in a file
FIRST = "encoder.block.0.layer."
FIXED: Plain = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


# ---------------------------------------------------------------- reading


def within(path: Path, tensors: Source) -> tuple[T5Config, Place] | None:
    """The T5 in a single file, or that of a file which lies beside it or in its folder text_encoders; None: neither."""
    if any(name.startswith(PREFIX) for name in tensors):
        return opened(tensors, PREFIX, path, path.parent)
    places = (
        folder / f"{stem}.safetensors" for stem in FILES for folder in (path.parent, path.parent / "text_encoders")
    )
    beside = next((place for place in places if place.is_file()), None)
    return None if beside is None else opened(unscaled(read_tensors(beside)), "", beside, path.parent)


def opened(source: Source, prefix: str, file: Path, folder: Path) -> tuple[T5Config, Place]:
    """A T5 whose names stand behind `prefix`, by its shapes. Raises UserError for one that is not of version 1.1."""
    shapes = {name.removeprefix(prefix): source.form(name)[1] for name in source if name.startswith(prefix)}
    try:
        vocabulary, width = shapes.get(SHARED) or shapes[TABLE]
        buckets, heads = shapes[f"{FIRST}0.SelfAttention.relative_attention_bias.weight"]
        hidden, _ = shapes[f"{FIRST}1.DenseReluDense.wi_0.weight"]
        inner, _ = shapes[f"{FIRST}0.SelfAttention.q.weight"]
        layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.block\.(\d+)\.", name)))
        config = T5Config(vocabulary, width, heads, inner // heads, hidden, layers, buckets)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the T5 in {file} is not one of version 1.1 (it has no {str(error)[:100]}, or in another shape), and no "
            "other is read; take t5xxl_fp16.safetensors, or leave T5 out: --set t5=null"
        ) from error
    return with_tokenizer(config, source, prefix, file, _kept(source, prefix, file) or _near(folder))


def in_directory(path: Path, source: Source) -> tuple[T5Config, Place]:
    """That of a directory of diffusers, whose tensors these are."""
    where = path / "text_encoder_3" / "config.json"
    config = read_config(read_json(where), str(where))
    return with_tokenizer(config, source, "", path / "text_encoder_3", _in_folder(path / "tokenizer_3"))


def with_tokenizer(
    config: T5Config, source: Source, prefix: str, file: Path, document: bytes | None
) -> tuple[T5Config, Place]:
    """The place of a T5 in a source that has the bytes of its tokenizer too."""
    table = f"{prefix}{SHARED if f'{prefix}{SHARED}' in source else TABLE}"
    own = (f"{prefix}encoder.", table)
    other = f"{prefix}{TABLE}" if table.endswith(SHARED) else ""  # the same once more
    scope = [name for name in source if name.startswith(own) and name != other]
    name = f"{prefix}{TOKENIZER}"
    if document is not None:
        data = torch.frombuffer(bytearray(document), dtype=torch.uint8)
        source = Changed(source, {name: Made((len(document),), lambda: data, torch.uint8)})
        scope.append(name)

    def names(keys: Iterable[str]) -> Names:
        special = {TABLE: table, "tokenizer": name}
        return {key: (special.get(key, f"{prefix}{key}"),) for key in keys}

    return replace(config, tokenizer=len(document or b"")), (source, names, tuple(scope), str(file))


def read_config(plain: Plain, where: str) -> T5Config:
    """text_encoder_3/config.json; raises UserError for what is not the encoder of a T5 of version 1.1."""
    refuse_others(plain, FIXED, where)
    names = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers", "relative_attention_num_buckets")
    usual = (32128, 512, 8, 64, 2048, 6, 32)  # of transformers' class
    found = (value(plain, name, default, where) for name, default in zip(names, usual, strict=True))
    return T5Config(*found)


# ---------------------------------------------------------------- the tokenizer


def _kept(source: Source, prefix: str, file: Path) -> bytes | None:
    """The one that is kept as bytes among the tensors."""
    for name, read in ((TOKENIZER, t5_tokenizer.checked), (SENTENCEPIECE, t5_tokenizer.of_sentencepiece)):
        for place in (f"{prefix}{name}", f"{prefix.removesuffix('transformer.')}{name}"):
            form = source.form(place) if place in source else None
            if form is not None and form[0] == torch.uint8:
                t5_tokenizer.check_size(math.prod(form[1]), f"{place} in {file}")  # before they are read
                return read(bytes(source[place].reshape(-1).numpy()), f"{place} in {file}")
    return None


def _near(folder: Path) -> bytes | None:
    """The one that lies beside a model in `folder`."""
    for place in (folder, folder / "text_encoders"):
        for inside in (place / "tokenizer_3", place):
            found = _in_folder(inside, ("spiece.model",) if inside == place else None)
            if found is not None:
                return found
    return None


def _in_folder(folder: Path, names: Iterable[str] | None = None) -> bytes | None:
    """That of a tokenizer's folder, as a tokenizer.json; None where there is none."""
    ways = {"tokenizer.json": t5_tokenizer.checked, "spiece.model": t5_tokenizer.of_sentencepiece}
    for name in names or ways:
        file = folder / name
        if file.is_file():
            try:
                with open(file, "rb") as stream:
                    return ways[name](stream.read(t5_tokenizer.MAX_BYTES + 1), str(file))
            except OSError as error:
                raise explain_os_error(error, f"reading {file}") from error
    return None


# ---------------------------------------------------------------- writing


def written(state: Mapping[str, Tensor], prefix: str, twice: bool) -> dict[str, Tensor]:
    """A T5's state in transformers' names, its table of tokens `twice` or once, without the tokenizer."""
    found = {f"{prefix}{key}": tensor for key, tensor in state.items() if key not in ("tokenizer", TABLE)}
    table = state[TABLE]
    return found | {f"{prefix}{SHARED}": table} | ({f"{prefix}{TABLE}": table.clone()} if twice else {})


def write_config(config: T5Config) -> dict[str, Any]:
    """text_encoder_3/config.json."""
    return {
        "architectures": ["T5EncoderModel"],
        **FIXED,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.hidden,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "relative_attention_num_buckets": config.buckets,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "dropout_rate": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def write_tokenizer(folder: Path, document: bytes) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    pieces = [piece for piece, _ in json.loads(document)["model"]["vocab"]]
    extra = [piece for piece in pieces if piece.startswith("<extra_id_")]
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": t5_tokenizer.PAD,
        "eos_token": t5_tokenizer.END,
        "unk_token": t5_tokenizer.UNKNOWN,
        "extra_ids": len(extra),
        "additional_special_tokens": extra,
        "model_max_length": 512,
    }
    atomic_write_text(folder / "tokenizer.json", document.decode())
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
