"""Each layout knows its own files and no other's, so the order in which they are tried decides nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints import export, native
from ldm.checkpoints.opening import LAYOUTS, open_checkpoint
from ldm.checkpoints.reading import read_tensors
from ldm.config import ModelConfig
from ldm.errors import UserError

from .small_models import SMALL, random_states


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in every layout, and the autoencoder alone in those that have it alone."""
    folder, states = tmp_path_factory.mktemp("layouts"), random_states(SMALL)
    alone, first = ModelConfig(SMALL.autoencoder), {"autoencoder": states["autoencoder"]}
    native.save(folder / "native", SMALL, states)
    native.save(folder / "native.safetensors", alone, first)
    export.write(folder / "original.safetensors", SMALL, states, "original")
    export.write(folder / "original autoencoder.safetensors", alone, first, "original")
    export.write(folder / "diffusers", SMALL, states, "diffusers")
    shutil.copy(folder / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("native", "native directory"),
        ("native.safetensors", "native file"),
        ("original.safetensors", "original single file"),
        ("original autoencoder.safetensors", "original autoencoder"),
        ("diffusers", "diffusers directory"),
        ("diffusers/vae", "diffusers autoencoder"),
        ("vae.safetensors", "diffusers autoencoder"),
    ],
)
def test_one_layout_recognises_it(written: Path, name: str, layout: str) -> None:
    path = written / name
    tensors = None if path.is_dir() else read_tensors(path)
    assert [each.recognises(path, tensors) for each in LAYOUTS].count(True) == 1
    found = open_checkpoint(path)
    assert found.layout == layout and found.config.autoencoder is not None
    assert replace(found.config.autoencoder, norm_groups=0) == SMALL.autoencoder  # told by shapes in the bare files
    assert all(list(found.state(part)) for part in found.parts)


def test_no_layout_recognises_another_file(written: Path, tmp_path: Path) -> None:
    loose = written / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors"
    for path, words in ((loose, "a U-Net of diffusers without its folder"), (tmp_path, "has no model.json")):
        with pytest.raises(UserError, match=words):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_conv_in.lora_down.weight", "is a LoRA, which goes over a model; say --lora "),
        ("unet.conv_in.lora_A.weight", "is a LoRA, which goes over a model; say --lora "),
        ("base_model.model.conv_in.hada_w1_a", "is a LoRA, which goes over a model; say --lora "),
        ("emb_params", "is an embedding, which goes over a model; say --embedding "),
        ("string_to_param.*", "is an embedding, which goes over a model; say --embedding "),
    ],
)
def test_what_goes_over_a_model_is_said_to(name: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match=f"{said}{file} beside the model"):
        open_checkpoint(file)


def test_weights_are_chosen_only_where_there_are_two_sets(written: Path) -> None:
    for name in ("native", "native.safetensors", "diffusers/vae", "vae.safetensors"):
        with pytest.raises(UserError, match="has one set of weights"):
            open_checkpoint(written / name, weights="ema")
