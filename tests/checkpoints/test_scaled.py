"""Weights of eight bits with scales beside them: the product is what is read; other short formats are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints import export
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_tensors
from ldm.checkpoints.scaled import unscaled
from ldm.errors import UserError

from .small_models import SMALL, random_states, same

FLOAT8 = torch.float8_e4m3fn
NOTE = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
LARGEST = 448.0  # that the type holds


def scaled(
    stored: dict[str, Tensor], scale: str, by_row: bool, note: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file with its linear layers in float8, each over its own scale; and the weights that are meant."""
    found, meant = dict(stored), dict(stored)
    for name, value in stored.items():
        if name.endswith(".weight") and value.ndim == 2 and "embedding" not in name:
            rows = value.abs().amax(1, keepdim=True) if by_row else value.abs().max()
            factor = rows / LARGEST
            layer = name.removesuffix(".weight")
            found[name] = (value / factor).to(FLOAT8)
            found[f"{layer}.{scale}"] = factor
            meant[name] = found[name].float() * factor
            if note:
                found[f"{layer}.comfy_quant"] = NOTE.clone()
    return found, meant


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    export.write(path, SMALL, random_states(SMALL), "original")
    return path


@pytest.mark.parametrize(
    ("scale", "by_row", "note"),
    [("scale_weight", False, False), ("weight_scale", False, True), ("weight_scale", True, True)],
)
def test_the_scales_are_multiplied_in(file: Path, tmp_path: Path, scale: str, by_row: bool, note: bool):
    found, meant = scaled(load_file(file), scale, by_row, note)
    layer = next(name for name in found if name.endswith(scale)).rpartition(".")[0]
    if not note:
        found["model.diffusion_model.scaled_fp8"] = torch.empty(0, dtype=FLOAT8)
        found[f"{layer}.scale_input"] = torch.tensor(1.0)
    save_file(found, tmp_path / "scaled.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    ours, wanted = open_checkpoint(tmp_path / "scaled.safetensors"), open_checkpoint(tmp_path / "meant.safetensors")
    assert ours.config == wanted.config and ours.foreign == ()
    for part in ("unet", "text", "autoencoder"):
        state = ours.state(part)
        assert same(state, wanted.state(part))
        assert all(state.form(name) == (value.dtype, value.shape) for name, value in state.items())


def test_a_file_without_scales_is_itself(file: Path):
    tensors = read_tensors(file)
    assert unscaled(tensors) is tensors


def test_the_diffusers_layout(tmp_path: Path):
    export.write(tmp_path / "d", SMALL, random_states(SMALL), "diffusers")
    weights = tmp_path / "d" / "unet" / "diffusion_pytorch_model.safetensors"
    found, meant = scaled(load_file(weights), "weight_scale", False, False)
    save_file(meant, weights)
    wanted = dict(open_checkpoint(tmp_path / "d").state("unet"))
    save_file(found, weights)
    assert same(open_checkpoint(tmp_path / "d").state("unet"), wanted)


def note(**settings: Any) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


ONE, WEIGHT = torch.tensor(1.0), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("tensors", "words", "named"),
    [
        ({"a.weight": WEIGHT.to(torch.int8), "a.weight_scale": ONE}, {}, r"a\.weight_scale.* not float8"),
        ({"a.weight": WEIGHT, "a.scale_weight": ONE}, {}, r"a\.scale_weight.* not float8"),
        ({"a.scale_weight": ONE}, {}, r"a\.scale_weight"),
        ({"a.weight": WEIGHT.to(FLOAT8), "a.weight_scale": torch.ones(4, 3)}, {}, "another shape"),
        ({"a.weight": WEIGHT.to(FLOAT8), "a.comfy_quant": note(format="nvfp4")}, {}, r"a\.comfy_quant.*nvfp4"),
        ({"a.comfy_quant": note(format="float8_e4m3fn", convrot=True)}, {}, "convrot"),
        ({"a.comfy_quant": torch.ones(3, dtype=torch.uint8)}, {}, "no JSON"),
        ({"a.comfy_quant": torch.ones(1 << 16, dtype=torch.uint8)}, {}, "no JSON"),
        (
            {"a.weight": WEIGHT},
            {"_quantization_metadata": '{"layers": {"a": {"format": "int8_tensorwise"}}}'},
            "int8_t",
        ),
        ({"a.weight": WEIGHT}, {"_quantization_metadata": "["}, "no JSON"),
        ({"a.weight": WEIGHT}, {"_quantization_metadata": "[]"}, "no JSON"),
    ],
)
def test_other_short_formats_are_refused_by_name(
    tensors: dict[str, Tensor], words: dict[str, str], named: str, tmp_path: Path
):
    save_file(tensors, tmp_path / "a.safetensors", words)
    with pytest.raises(UserError, match=named):
        unscaled(read_tensors(tmp_path / "a.safetensors"))


def test_half_a_letter_in_the_metadata_is_no_json(tmp_path: Path):
    tensor = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = rb'{"__metadata__": {"_quantization_metadata": "\ud800"}, ' + tensor + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"a")
    with pytest.raises(UserError, match="no JSON"):
        unscaled(read_tensors(tmp_path / "x.safetensors"))


def test_quantized_folders_of_diffusers_are_refused_by_name(tmp_path: Path):
    export.write(tmp_path / "d", SMALL, random_states(SMALL), "diffusers")
    where = tmp_path / "d" / "unet" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"quantization_config": {"quant_method": "quanto"}}))
    with pytest.raises(UserError, match=r"quantization_config is .*quanto"):
        open_checkpoint(tmp_path / "d")
