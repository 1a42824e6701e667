"""The native checkpoint: safetensors and one JSON, nothing that can execute.

A directory                                or one file

    model.json               "format", ModelConfig      m.safetensors   metadata "model": the same JSON
    autoencoder.safetensors  its state dict                             keys "autoencoder.…"
    text.safetensors                                                         "text.…"
    unet.safetensors                                                         "unet.…"

Only the parts whose config is not None are there; the identity codec has a config and no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.checkpoints import networks
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.reading import read_metadata, read_tensors
from ldm.checkpoints.record import Checkpoint, Part
from ldm.checkpoints.writing import write_tensors
from ldm.config import ModelConfig, from_dict, to_dict
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.plain import parse_json, read_json

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec
    from ldm.conditioning.clip import TextTower
    from ldm.unet.unet import UNet

FORMAT = "ldm-1"
PARTS = ("autoencoder", "text", "unet")
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
    kinds = {"autoencoder": config.autoencoder, "text": config.text, "unet": config.unet}
    identity = config.autoencoder is not None and config.autoencoder.kind == "identity"
    return tuple(name for name in PARTS if kinds[name] is not None and not (name == "autoencoder" and identity))


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


def load_autoencoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> Codec:
    """The codec of the checkpoint at `path`: weights, shift and scale.

    Here and below: the network comes frozen and in evaluation mode; `config` is what read_config(path) gave, if the
    caller has it already. Raises UserError for a file that is missing, torn, a pickle, without this part, or of
    another architecture than its config says.
    """
    return networks.load_autoencoder(_one(path, "autoencoder", config), device, dtype)


def load_text(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> TextTower:
    """The text tower of the checkpoint at `path`; see load_autoencoder."""
    return networks.load_text(_one(path, "text", config), device, dtype)


def load_unet(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> UNet:
    """The U-Net of the checkpoint at `path`; see load_autoencoder."""
    return networks.load_unet(_one(path, "unet", config), device, dtype)


def open_native(path: Path) -> Checkpoint:
    """The checkpoint at `path`, for those who read other formats too."""
    config = read_config(path)
    parts = {name: _part(path, name) for name in part_names(config)}
    layout = "native directory" if path.is_dir() else "native file"
    return Checkpoint(path, layout, config, parts)


def is_native(document: str) -> bool:
    """Whether the word "model" in a file's metadata is a model config of ours."""
    return document.lstrip().startswith("{")


def _one(path: str | Path, name: str, config: ModelConfig | None) -> Checkpoint:
    """The checkpoint at `path` with one part in sight: the files of the others are not looked at."""
    path = Path(path)
    config = config or read_config(path)
    parts = {name: _part(path, name)} if name in part_names(config) else {}
    return Checkpoint(path, "native", config, parts)


def _part(path: Path, name: str) -> Part:
    file, prefix = _place(path, name)
    stored = read_tensors(file)
    scope = tuple(key for key in stored if key.startswith(prefix))
    return Part(stored, lambda keys: {key: (prefix + key,) for key in keys}, scope, str(file))


def read_part(path: str | Path, name: str) -> dict[str, Tensor]:
    """The state dict of one part ("autoencoder", "text", "unet") as it is stored, on the CPU; raises UserError."""
    file, prefix = _place(Path(path), name)
    stored = read_tensors(file)
    return {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}


def read_parts(path: str | Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Several parts as they are stored, each key with its part's name in front ("unet.conv_in.weight")."""
    return {f"{name}.{key}": value for name in names for key, value in read_part(path, name).items()}


def _place(path: Path, name: str) -> tuple[Path, str]:
    """The file that holds part `name`, and the prefix of its keys there."""
    return (path / f"{name}.safetensors", "") if path.is_dir() else (path, f"{name}.")


# ---------------------------------------------------------------- identity


def fingerprint(weights: str | Path | Weights) -> str:
    """sha256, in hex, of names, types, shapes and bytes of all tensors, in the order of their names.

    Of a module or state dict, or of a checkpoint's stored tensors (names then begin with "autoencoder.", "text.",
    "unet."; a directory and a file with the same tensors agree). A checkpoint stored in half precision and the module
    it loads into differ, since their numbers do.
    """
    if isinstance(weights, nn.Module):
        state: Mapping[str, Tensor] = weights.state_dict()
    elif isinstance(weights, Mapping):
        state = weights
    else:
        state = read_parts(weights, part_names(read_config(weights)))
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
