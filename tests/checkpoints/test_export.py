"""What foreign formats have no words for: said in other words that draw the same, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.autoencoder.blocks import said_groups
from ldm.autoencoder.codec import Codec
from ldm.autoencoder.kl import AutoencoderKL
from ldm.checkpoints import export, foreign
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning.clip import END, START, TextTower
from ldm.config import AutoencoderConfig, ModelConfig, TextConfig
from ldm.errors import UserError

from .small_models import SMALL, random_states


def codec(config: AutoencoderConfig, state: Any) -> Codec:
    network = AutoencoderKL(config)
    network.load_state_dict(state)
    return Codec(network.double().eval(), config)


@pytest.mark.parametrize("to", foreign.FORMATS)
def test_shift_and_scale_of_each_channel_are_folded_into_the_weights(to: str):
    shift, scale = (0.5, -1.0, 0.0, 2.0), (0.1, 0.5, 1.0, 3.0)
    config = replace(SMALL, autoencoder=AutoencoderConfig(channels=128, multipliers=(1, 1), shift=shift, scale=scale))
    states = random_states(config)
    states["autoencoder"] = {key: value.double() for key, value in states["autoencoder"].items()}
    made, found, remarks = export.prepare(config, states, to)
    assert any("folded" in remark for remark in remarks)
    assert config.autoencoder and made.autoencoder and made.autoencoder.scale == (0.18215,)
    assert made.autoencoder.shift == (0.0,)
    before, after = codec(config.autoencoder, states["autoencoder"]), codec(made.autoencoder, found["autoencoder"])
    image, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        latent = before.encode(image, noise)
        torch.testing.assert_close(after.encode(image, noise), latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.decode(latent), before.decode(latent), rtol=1e-5, atol=1e-5)


def test_a_scale_that_the_format_has_a_word_for_stays(tmp_path: Path):
    config = replace(SMALL, autoencoder=replace(SMALL.autoencoder, scale=(0.13025,)))
    states = random_states(config)
    made, found, _ = export.prepare(config, states, "diffusers")
    assert made.autoencoder == config.autoencoder and found["autoencoder"] is states["autoencoder"]
    made, _, _ = export.prepare(config, states, "original")  # whose readers take 0.18215 for granted
    assert made.autoencoder is not None and made.autoencoder.scale == (0.18215,)


def test_a_short_token_table_is_written_whole(tmp_path: Path):
    ids = (0, *range(300, 600), START, END)
    config = replace(SMALL, text=replace(SMALL.text, token_ids=ids, context_length=16))
    states = random_states(config)
    assert any(
        "49,408 rows" in remark for remark in export.write(tmp_path / "m.safetensors", config, states, "original")
    )
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    tower = checkpoint.load("text")
    assert config.text is not None
    ours = TextTower(config.text)
    ours.load_state_dict(states["text"])
    tokens = torch.tensor([[START, 305, 20_000, 599, 7, END] + [0] * 10])  # two of them have no row of their own
    with torch.no_grad():
        assert torch.equal(tower(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"autoencoder": {"patch": 2}}, "autoencoder.patch=2"),
        ({"autoencoder": {"channels": 32}}, "8 groups"),
        ({"unet": {"time_embedding": "fourier"}}, "unet.time_embedding=fourier"),
        ({"unet": {"classes": 3}}, "unet.classes=3"),
        ({"unet": {"channels": 48, "head_width": 48}}, "unet.channels=48"),
        ({"unet": {"context_width": 0}}, "without a context"),
        ({"learned_variance": True}, "learned_variance"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    config = SMALL
    for name, value in changes.items():
        inner = replace(getattr(config, name), **value) if isinstance(value, dict) else value
        config = replace(config, **{name: inner})
    states: dict[str, Any] = {"autoencoder": {}, "text": {}, "unet": {}}
    with pytest.raises(UserError, match=f"no place for .*{words}"):
        export.write(tmp_path / "m.safetensors", config, states, "original")
    assert list(tmp_path.iterdir()) == []


def narrow(channels: int, groups: int) -> ModelConfig:
    config = AutoencoderConfig(channels=channels, multipliers=(1, 2), blocks=1, norm_groups=groups)
    return replace(SMALL, autoencoder=config)


@pytest.mark.parametrize(
    ("channels", "groups", "to"), [(16, 4, "diffusers"), (32, 32, "diffusers"), (32, 32, "original")]
)
def test_a_narrow_autoencoder_comes_back_with_its_groups(channels: int, groups: int, to: str, tmp_path: Path):
    config = narrow(channels, groups)
    path = tmp_path / ("m.safetensors" if to == "original" else "m")
    export.write(path, config, states := random_states(config), to)
    if to == "original":  # as a stranger's, without our config
        save_file(load_file(path), path)
    found = open_checkpoint(path)
    assert found.config.autoencoder == config.autoencoder
    ours, theirs = codec(config.autoencoder, states["autoencoder"]), found.load("autoencoder", dtype=torch.float64)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(theirs.encode(image), ours.encode(image))


def test_the_usual_groups_are_not_said():
    """So that a model's hash, and the name of its architecture, are what they were."""
    assert said_groups((128, 256, 512, 512), 32) == 0 == said_groups((64,), 16)
    assert said_groups((64, 128), 32) == 32 and said_groups((64, 128), 16) == 16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SMALL, "an original file and a diffusers directory"),
        (ModelConfig(AutoencoderConfig()), "an original file and a diffusers directory"),
        (
            narrow(16, 4),
            "a diffusers directory; an original file has no place for an autoencoder whose norms have 4",
        ),
        (
            narrow(16, 0),
            "our own format alone: others have no place for an autoencoder whose norms have 4 and 8",
        ),
        (
            replace(SMALL, unet=replace(SMALL.unet, multipliers=(2, 4))),
            "an original file; a diffusers directory has no place for unet.multipliers=[2, 4], which do not",
        ),
        (
            replace(SMALL, autoencoder=AutoencoderConfig(kind="identity")),
            "our own format alone: others hold a whole model or an autoencoder",
        ),
        (ModelConfig(text=SMALL.text), "our own format alone: others hold a whole model or an autoencoder"),
        (
            replace(SMALL, text=TextConfig(arch="MobileCLIP2-S0")),
            "our own format alone: others have no place for text.arch=MobileCLIP2-S0, whose tokens see",
        ),
        (replace(SMALL, parameterization="edm"), "our own format alone: others have no place for parameterization=edm"),
    ],
)
def test_a_plan_can_say_where_a_model_will_go(config: ModelConfig, words: str):
    assert foreign.where_to(config).startswith(words)


def test_where_it_is_written(tmp_path: Path):
    states = random_states(SMALL)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        export.write(tmp_path / "m.ckpt", SMALL, states, "original")
    with pytest.raises(UserError, match="is a directory"):
        export.write(tmp_path / "m.safetensors", SMALL, states, "diffusers")
    with pytest.raises(UserError, match="a whole model or an autoencoder"):
        export.write(tmp_path / "m", ModelConfig(unet=SMALL.unet), {"unet": states["unet"]}, "diffusers")
