"""Weights kept in eight bits with a number beside them: what is meant is the stored weight times that number.

    layer.weight         float8
    layer.scale_weight   one float32, or one for each row; later files call it weight_scale
    layer.scale_input    for products in float8 (later input_scale), which are not made here
    layer.comfy_quant    {"format": "float8_e4m3fn"} as bytes; or the same of all layers in the metadata
    scaled_fp8           marks the file

They are read as float32: the product, rounded once. Other formats of so few bits are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.reading import Tensors
from ldm.errors import UserError

SCALE = re.compile(r"\.(scale_weight|weight_scale)$")
BESIDE = re.compile(r"\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)$|(^|\.)scaled_fp8$")
FORMATS = ("float8_e4m3fn", "float8_e5m2")
PLAIN = {"format", "full_precision_matrix_mult"}  # the settings of a layer that do not change what its weights are
MAX_NOTE = 1 << 12  # bytes of a layer's comfy_quant


class Scaled(Mapping[str, Tensor]):
    """The tensors of a file with the scales multiplied in; what stands beside them is not among its names."""

    def __init__(self, tensors: Tensors):
        self.path, self.metadata, self._tensors = tensors.path, tensors.metadata, tensors
        self._names = [name for name in tensors if not BESIDE.search(name)]
        self._scale = {SCALE.sub(".weight", name): name for name in tensors if SCALE.search(name)}

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[name]
        if name not in self._scale:
            return value
        scale = self._tensors[self._scale[name]].float()
        return value.float() * scale.reshape(-1, *(1,) * (value.ndim - 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors and not BESIDE.search(str(name))

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor, without reading it."""
        dtype, shape = self._tensors.form(name)
        return (torch.float32 if name in self._scale else dtype), shape


def unscaled(tensors: Tensors) -> Tensors | Scaled:
    """`tensors` themselves, or with their scales multiplied in; raises UserError for a format that is not read."""
    notes = {name: tensors.form(name) for name in tensors if BESIDE.search(name)}
    layers = _layers(tensors.metadata, tensors.path)
    for name, (dtype, shape) in notes.items():
        if name.endswith(".comfy_quant"):
            if dtype != torch.uint8 or len(shape) != 1 or shape[0] > MAX_NOTE:
                raise _unreadable(tensors.path, name)
            layers[name] = _json(bytes(tensors[name].tolist()), tensors.path, name)
        elif SCALE.search(name):
            _check_scale(tensors, SCALE.sub(".weight", name), name, shape)
    for name, settings in layers.items():
        if not isinstance(settings, dict) or settings.get("format") not in FORMATS or set(settings) - PLAIN:
            raise UserError(
                f"{tensors.path} keeps weights in a short format that is not read ({name[:100]}: "
                f"{str(settings)[:100]}); {' and '.join(FORMATS)} are: take the file in fp16 or fp8"
            )
    return Scaled(tensors) if notes else tensors


def _check_scale(tensors: Tensors, weight: str, name: str, shape: tuple[int, ...]) -> None:
    if weight in tensors:
        dtype, sides = tensors.form(weight)
        rows = sides[0] if sides else 1
        fits = shape in ((), (1,)) or (shape[0] == rows and all(side == 1 for side in shape[1:]))
        if fits and str(dtype).removeprefix("torch.") in FORMATS and tensors.form(name)[0].is_floating_point:
            return
    raise UserError(
        f"{tensors.path} holds {name[:100]}, a scale of weights that are not float8, or one of another shape than a "
        "number, or a number for each row; such weights are not read: take the file in fp16 or fp8"
    )


def _layers(metadata: Mapping[str, str], path: Path) -> dict[str, object]:
    """Layer -> its format, from the metadata of later files."""
    document = metadata.get("_quantization_metadata")
    if document is None:
        return {}
    plain = _json(document, path, "_quantization_metadata")
    layers = plain.get("layers", {}) if isinstance(plain, dict) else None
    if not isinstance(layers, dict):
        raise _unreadable(path, "_quantization_metadata")
    return dict(layers)


def _json(document: bytes | str, path: Path, name: str) -> object:
    try:
        return json.loads(document)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, name) from error


def _unreadable(path: Path, name: str) -> UserError:
    return UserError(f"{path} says in {name[:100]} how its weights are kept, and that is no JSON; copy it again")
