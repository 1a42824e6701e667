"""The transformer is trained and drawn with by the ordinary commands, as any network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ldm
from ldm.config import DiffusionTraining, load
from ldm.errors import UserError
from ldm.training.loop import carry_out
from ldm.training.stage_two import diffusion_stage

ROOT = Path(__file__).parents[2]
ICONS, RECIPE = ROOT / "tests" / "fixtures" / "icons", ROOT / "configs" / "diffusion" / "mmdit_tiny.yaml"
SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "model.context_width=32", "model.side=4"]
QUICK = [
    "data.where={}",
    "loop.steps=4",
    "loop.global_batch=4",
    "loop.log_every=2",
    "loop.precision=fp32",
    "loop.threads=1",
    "sample.prompts=[a pizza]",
]


def settings(folder: Path, checkpoint: Path, *more: str) -> DiffusionTraining:
    parts = [
        f"autoencoder={checkpoint}",
        f"text={checkpoint}",
        "model.context_width=32",
        "data.size=32",
        "model.side=4",
    ]
    words = [*SMALL, *QUICK, *parts, f"data.shards={ICONS}/train-*.tar", f"output={folder}", *more]
    return load(DiffusionTraining, RECIPE, words)


def test_the_recipe_trains_a_transformer_that_is_loaded_and_drawn_with(tmp_path: Path, tiny_checkpoint: Path) -> None:
    carry_out(settings(tmp_path / "run", tiny_checkpoint), diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert model.config.unet is not None and model.config.unet.kind == "mmdit"
    assert model.law.parameterization.name == "flow"
    image = model.txt2img("a pizza", steps=3, cfg=2.0, sampler="euler")
    assert image.shape == (1, 3, 32, 32) and bool(image.isfinite().all()) and float(image.std()) > 0
    carry_out(settings(tmp_path / "more", tiny_checkpoint, f"init={tmp_path / 'run'}", *NO_PARTS), diffusion_stage)
    before, after = (ldm.load(tmp_path / name, device="cpu").unet.state_dict() for name in ("run", "more"))
    assert before.keys() == after.keys() and not torch.equal(before["out.weight"], after["out.weight"])
    assert torch.equal(before["positions"], after["positions"])


NO_PARTS = ["autoencoder=", "text=", "model={}", "parameterization=", "schedule={}"]


def test_of_classes_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    classes = ["text=", "model.context_width=0", "model.classes=2", "data.label=source", "sample.prompts=[]"]
    classes += ["encoder.labels=[noto, fluent-flat]"]
    carry_out(settings(tmp_path / "run", tiny_checkpoint, *classes), diffusion_stage)
    model = ldm.load(tmp_path / "run", device="cpu")
    assert math.isfinite(float(model.txt2img(label="noto", steps=2).sum()))


def test_settings_of_the_other_network_are_refused_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"unknown setting 'model\.multipliers'"):
        settings(tmp_path, tiny_checkpoint, "model.multipliers=[1,2]")
    with pytest.raises(UserError, match=r"model\.heads"):
        diffusion_stage(settings(tmp_path, tiny_checkpoint, "model.heads=5"), 0, 1, torch.device("cpu"))
