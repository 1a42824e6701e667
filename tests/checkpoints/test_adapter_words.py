"""What the files of a LoRA and a word say of themselves, as the common readers look for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.adapters.changes import Factors
from ldm.adapters.lora import Lora, Rows
from ldm.checkpoints import native
from ldm.checkpoints.adapter_words import training_words
from ldm.checkpoints.architectures import KNOWN, SD_V1, SD_V2, SD_V2_BASE
from ldm.checkpoints.lora import save_lora
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_metadata
from ldm.checkpoints.record import Checkpoint
from ldm.config import DataConfig, DiffusionLossConfig, DiffusionTraining, LoopConfig, ModelConfig, OptimizerConfig
from ldm.jobs.adapters import read_hash


@pytest.mark.parametrize(
    ("model", "version", "v2", "architecture", "prediction"),
    [
        (SD_V1, "sd_v1", "False", "stable-diffusion-v1", "epsilon"),
        (replace(SD_V1, parameterization="v"), "sd_v1", "False", "stable-diffusion-v1", "v"),
        (SD_V2_BASE, "sd_v2", "True", "stable-diffusion-v2-512", "epsilon"),
        (SD_V2, "sd_v2_v", "True", "stable-diffusion-v2-768-v", "v"),
        (KNOWN["Stable Diffusion XL"], "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base", "epsilon"),
    ],
)
def test_what_others_sort_by(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: ModelConfig,
    version: str,
    v2: str,
    architecture: str,
    prediction: str,
) -> None:
    monkeypatch.setattr(Checkpoint, "base_hash", "ab" * 32)
    said = training_words("lora", DiffusionTraining(), replace(open_checkpoint(tiny_checkpoint), config=model), False)
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, v2)
    assert said["modelspec.architecture"] == f"{architecture}/lora" and "ss_steps" not in said
    assert said["modelspec.prediction_type"] == prediction and said["ldm.base_hash"] == "ab" * 32


def test_the_settings_of_the_training(tiny_checkpoint: Path, tiny_model, tmp_path: Path) -> None:
    parts = {"autoencoder": tiny_model.codec.autoencoder, "text": tiny_model.text, "unet": tiny_model.unet}
    native.save(tmp_path / "base.safetensors", tiny_model.config, parts)
    config = DiffusionTraining(
        output="runs/cats",
        init=str(tmp_path / "base.safetensors"),
        data=DataConfig(size=96),
        loss=DiffusionLossConfig(weight="min_snr", min_snr_gamma=3.0, offset_noise=0.1, caption_dropout=0.2),
        optimizer=OptimizerConfig(rate=2e-4, warmup=7, law="cosine", clip=0.5),
        loop=LoopConfig(steps=40, global_batch=6, seed=3),
    )
    unet = tiny_model.unet
    name = "down.0.stages.0.residual.conv_in.weight"
    out, *rest = unet.get_parameter(name).shape
    lora = Lora({"unet": {Rows(name): Factors(torch.ones(3, *rest), torch.ones(out, 3, 1, 1), 1.5)}})
    words = training_words("lora", config, open_checkpoint(tmp_path / "base.safetensors"), True)
    for layout in ("diffusers", "kohya"):
        save_lora(tmp_path / layout, lora, unet, None, layout, words)
        said = read_metadata(tmp_path / layout)
        assert said.items() >= words.items()
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("3", "1.5")
    assert said["ss_new_sd_model_hash"] == read_hash(tmp_path / "base.safetensors")
    assert said["ldm.base_hash"] == open_checkpoint(tiny_checkpoint).base_hash  # of the same weights in a directory
    expected = {
        "ss_sd_model_name": "base.safetensors",
        "ss_output_name": "cats",
        "modelspec.title": "cats",
        "modelspec.resolution": "96x96",
        "ss_resolution": "(96, 96)",
        "ss_steps": "40",
        "ss_max_train_steps": "40",
        "ss_total_batch_size": "6",
        "ss_seed": "3",
        "ss_learning_rate": "0.0002",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "7",
        "ss_max_grad_norm": "0.5",
        "ss_noise_offset": "0.1",
        "ss_min_snr_gamma": "3",
        "ss_caption_dropout_rate": "0.2",
    }
    assert said.items() >= expected.items()
    assert not any("/" in value for key, value in said.items() if key != "modelspec.architecture")  # nobody's folders
