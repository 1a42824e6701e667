"""The YAML beside an original file, in both dialects, goes before the rules, and against nothing else that is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ldm.checkpoints.record import Checkpoint
from ldm.config import AutoencoderConfig, ScheduleConfig
from ldm.errors import UserError

from .listed import LISTS, SCHEDULE, opened

YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "eps"
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    image_size: 64
    scale_factor: 0.2
    unet_config:
      params: {num_head_channels: 64, use_linear_in_transformer: True}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params: {freeze: True, layer: "last"}
"""
BARE = """
model:
  params:
    linear_start: 0.00085
    linear_end: 0.0120
"""
SUCCESSOR = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.18215
    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
      params:
        num_idx: 1000
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling
        discretization_config:
          target: sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization
    network_config:
      target: sgm.modules.diffusionmodules.openaimodel.UNetModel
      params: {num_head_channels: 64, use_linear_in_transformer: True}
    conditioner_config:
      target: sgm.modules.GeneralConditioner
      params:
        emb_models:
          - input_key: txt
            target: sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder
            params: {freeze: true, layer: penultimate}
"""


def beside(folder: Path, yaml: str, of: str = "v2", drop: tuple[str, ...] = (), **words: str) -> Checkpoint:
    """The list `of` without the tensors `drop`, with this YAML beside it."""
    (folder / "sd.yaml").write_text(yaml)
    shapes = {name: shape for name, shape in LISTS[of].items() if name not in drop}
    return opened(shapes, path=folder / "sd.ckpt", words={key.replace("__", "."): word for key, word in words.items()})


def test_it_goes_before_the_rules(tmp_path: Path):
    checkpoint = beside(tmp_path, YAML)
    config = checkpoint.config
    assert config.parameterization == "eps" and config.text is not None and config.text.layer == "last"
    assert config.autoencoder == AutoencoderConfig(scale=(0.2,)) and checkpoint.assumed == ("image_size",)
    assert any("after all its blocks" in notice for notice in checkpoint.notices)


def test_the_successors_dialect(tmp_path: Path):
    checkpoint = beside(tmp_path, SUCCESSOR)
    assert checkpoint.config.parameterization == "eps" and checkpoint.config.schedule == ScheduleConfig()
    assert checkpoint.config.unet is not None and checkpoint.config.unet.head_width == 64
    assert checkpoint.config.text is not None and checkpoint.config.text.layer == "penultimate"
    assert checkpoint.assumed == ("image_size",)
    assert beside(tmp_path, SUCCESSOR.replace("EpsScaling", "VScaling")).config.parameterization == "v"
    for word in ("EDMScaling", "LegacyDDPMDiscretization", "DiscreteDenoiser"):
        other = SUCCESSOR.replace("EpsScaling", word) if word == "EDMScaling" else SUCCESSOR.replace(word, "Other")
        with pytest.raises(UserError, match=r"EDMScaling|Other"):
            beside(tmp_path, other)


def test_what_it_does_not_set_is_the_scripts_own(tmp_path: Path):
    """Its scripts predict eps unless told otherwise."""
    assert beside(tmp_path, BARE).config.parameterization == "eps"
    tables = tuple(SCHEDULE)
    schedule = beside(tmp_path, "model: {params: {timesteps: 500}}", drop=tables).config.schedule
    assert schedule == ScheduleConfig("scaled_linear", 500, 1e-4, 2e-2)
    rescaled = beside(tmp_path, BARE + "    rescale_betas_zero_snr: true\n    parameterization: v\n", drop=tables)
    assert rescaled.config.schedule == ScheduleConfig(zero_terminal_snr=True)


def text(kind: str, settings: str) -> str:
    return BARE + f"    cond_stage_config: {{target: ldm.modules.encoders.modules.{kind}, params: {{{settings}}}}}\n"


@pytest.mark.parametrize(
    ("of", "kind", "settings", "wanted"),
    [
        ("v1", "FrozenCLIPEmbedder", "", {"layer": "last", "quick_gelu": True, "padding": "eot"}),
        ("v2", "FrozenOpenCLIPEmbedder", "layer: penultimate", {"layer": "penultimate", "quick_gelu": False}),
        ("v2", "FrozenOpenCLIPEmbedder", "", {"layer": "last", "padding": "zero"}),
        ("v2", "FrozenOpenCLIPEmbedder", "arch: ViT-H-14-quickgelu", {"quick_gelu": True}),
    ],
)
def test_its_text_encoder(tmp_path: Path, of: str, kind: str, settings: str, wanted: Mapping[str, object]):
    config = beside(tmp_path, text(kind, settings), of).config.text
    assert config is not None and {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("of", "kind", "settings"),
    [
        ("v1", "FrozenCLIPEmbedder", "layer: hidden, layer_idx: 11"),  # without the final LayerNorm
        ("v1", "FrozenCLIPEmbedder", "layer: pooled"),
        ("v1", "FrozenCLIPTextEmbedder", ""),
        ("v1", "FrozenOpenCLIPEmbedder", "layer: penultimate"),
        ("v2", "FrozenOpenCLIPEmbedder", "layer: hidden"),
        ("v2", "FrozenCLIPEmbedder", ""),
    ],
)
def test_another_text_encoder_is_refused_by_name(tmp_path: Path, of: str, kind: str, settings: str):
    with pytest.raises(UserError, match=rf"sd\.yaml with {kind}.*--set text\.layer"):
        beside(tmp_path, text(kind, settings), of)
    shapes = LISTS[of]
    assert opened(shapes, path=tmp_path / "sd.ckpt", decided=("text.layer",)).config.text is not None


@pytest.mark.parametrize(
    "line",
    ["beta_schedule: sqrt", "parameterization: w", "given_betas: [0.1, 0.2]", "{beta_schedule: cosine, cosine_s: 0.1}"],
)
def test_another_law_is_refused_by_name(tmp_path: Path, line: str):
    lines = line.strip("{}").replace(", c", "\n    c")
    with pytest.raises(UserError, match=r"sd\.yaml with (beta_schedule|parameterization)"):
        beside(tmp_path, BARE + f"    {lines}\n", drop=tuple(SCHEDULE))


def test_another_setting_than_its_type_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"sd\.yaml has a setting"):
        beside(tmp_path, BARE + "    timesteps: many\n")


def test_against_the_file_it_is_refused_with_both_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"modelspec\.prediction_type=v .*is v, .*sd\.yaml .*eps.*--set parameteriz"):
        beside(tmp_path, YAML, modelspec__prediction_type="v")
    with pytest.raises(UserError, match=r"sd\.yaml .*0\.0001.*table alphas_cumprod.*0\.00085.*schedule\.kind"):
        beside(tmp_path, YAML.replace("0.00085", "0.0001"))


def test_one_that_says_nothing_is_told(tmp_path: Path):
    checkpoint = beside(tmp_path, "name: a\n")
    assert any("sd.yaml says nothing of a model" in notice for notice in checkpoint.notices)
