"""The native checkpoint: safetensors and one JSON, nothing that can execute.

A directory                                or one file

    model.json               "format", ModelConfig      m.safetensors   metadata "model": the same JSON
    autoencoder.safetensors  its state dict                             keys "autoencoder.…"
    text.safetensors                                                         "text.…"
    text_2.safetensors                                                       "text_2.…"
    t5.safetensors           its tokenizer among them, as bytes              "t5.…"
    unet.safetensors                                                         "unet.…"

Only the parts whose config is not None are there; the identity codec has a config and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.limits import check_size
from ldm.checkpoints.reading import Tensors, read_metadata, read_tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.run_folder import gone_on
from ldm.checkpoints.state import fingerprint as fingerprint_of
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.model_config import TOWERS, ModelConfig
from ldm.plain import parse_json, read_json
from ldm.settings import from_dict, to_dict

FORMAT = "ldm-1"
PARTS = ("autoencoder", *TOWERS, "t5", "unet")
Weights = nn.Module | Mapping[str, Tensor]


# ---------------------------------------------------------------- writing


def save(path: str | Path, config: ModelConfig, parts: Mapping[str, Weights], dtype: torch.dtype | None = None) -> None:
    """Write `parts` ("autoencoder", "text", "unet" -> module or state dict) and `config` to `path`.

    `path` is a directory, or one file if it ends in ".safetensors". `dtype` converts the floating tensors on the way
    (torch.float16 halves the size); None keeps them. A reader sees the old checkpoint or the new one: all files are
    written beside the old ones first, then renamed, model.json last. Raises UserError if the disk does not take it.
    """
    path = Path(path)
    wanted = part_names(config)
    if set(parts) != set(wanted):
        raise ValueError(f"the config has the parts {wanted}, the weights are of {tuple(parts)}")
    tensors = {name: _storable(parts[name], dtype) for name in wanted}
    document = _document(config)
    if path.suffix == ".safetensors":
        joined = {f"{name}.{key}": value for name in wanted for key, value in tensors[name].items()}
        with atomic_write(path) as temporary:
            write_tensors(joined, temporary, {"format": "pt", "model": document})
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the checkpoint, or a file ending in .safetensors")
    with ExitStack() as renames:  # leaves in reverse order: model.json, entered first, is renamed last
        renames.enter_context(atomic_write(path / "model.json")).write_text(document, encoding="utf-8")
        for name in wanted:
            temporary = renames.enter_context(atomic_write(path / f"{name}.safetensors"))
            write_tensors(tensors[name], temporary, {"format": "pt"})


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """The parts of `config` that have weights, in the order of PARTS."""
    identity = config.autoencoder is not None and config.autoencoder.kind == "identity"
    there = (name for name in PARTS if getattr(config, name) is not None)
    return tuple(name for name in there if not (name == "autoencoder" and identity))


def _document(config: ModelConfig) -> str:
    """The JSON of `config`, one line for each of its fields: token lists are long and nobody reads them down."""
    fields = {"format": FORMAT, **to_dict(config)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
    return f"{{\n{lines}\n}}\n"


def _storable(weights: Weights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    stored = {}
    for key, value in state.items():
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        stored[key] = value.detach().to("cpu", kept).contiguous()
    return stored


# ---------------------------------------------------------------- reading


def read_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of the checkpoint at `path` (directory or .safetensors file); raises UserError."""
    path = Path(path)
    where = path / "model.json" if path.is_dir() else path
    if path.is_dir():
        if not where.exists():
            raise UserError(f"{path} has no model.json, so it is not a checkpoint; name the directory a training wrote")
        plain = read_json(where)
    else:
        text = read_metadata(path).get("model", "")
        if not text:
            raise UserError(
                f"{path} has no model config in its metadata, so it is not a native checkpoint; "
                "tools/convert_checkpoint.py makes one of foreign ones"
            )
        plain = parse_json(text, where)
    version = plain.pop("format", None)
    if version != FORMAT:
        raise UserError(
            f"{where} has the format {version!r:.40} and this version reads {FORMAT!r}; update one of the two"
        )
    return check_size(from_dict(ModelConfig, plain, str(where)), str(where))


def is_native(path: Path, tensors: Tensors | None) -> bool:
    """Whether it is a directory or file of ours."""
    if tensors is None:
        return (path / "model.json").is_file()
    return tensors.metadata.get("model", "").lstrip().startswith("{")


def open_native(path: Path, tensors: Tensors | None) -> Checkpoint:
    """The checkpoint in the directory `path`, or in the file of these tensors. Raises UserError for a file that is
    missing, torn, or a pickle.
    """
    config = read_config(path)
    if tensors is None:
        files = {name: path / f"{name}.safetensors" for name in part_names(config)}
        parts = {name: _part(read_tensors(file), "", file) for name, file in files.items()}
        return Checkpoint(path, "native directory", config, parts, remarks=tuple(filter(None, [gone_on(path)])))
    parts = {name: _part(tensors, f"{name}.", path) for name in part_names(config)}
    return Checkpoint(path, "native file", config, parts)


def _part(stored: Tensors, prefix: str, file: Path) -> Part:
    scope = tuple(key for key in stored if key.startswith(prefix))
    return Part(stored, lambda keys: {key: (prefix + key,) for key in keys}, scope, str(file))


# ---------------------------------------------------------------- identity


def fingerprint(weights: Weights, stored: bool = True) -> str:
    """sha256, in hex, of names, types, shapes and bytes of all tensors, in the order of their names.

    Of a module or state dict, or of a checkpoint's stored tensors (`Checkpoint.tensors`: a directory and a file with
    the same ones agree). A checkpoint stored in half precision and the module it loads into differ, unless `stored` is
    false: floats are then told by their numbers, as float32.
    """
    return fingerprint_of(weights.state_dict() if isinstance(weights, nn.Module) else weights, stored)
